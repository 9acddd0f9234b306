"""The demo suite: on images that are made here or come with packages. Every module is imported by the registry."""
