"""The real suite. Its data are in the user's folder --data. The registry imports every module."""
