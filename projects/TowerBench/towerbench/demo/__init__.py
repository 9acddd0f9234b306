"""The demo suite. Its images are made here or come with packages. The registry imports every module."""
