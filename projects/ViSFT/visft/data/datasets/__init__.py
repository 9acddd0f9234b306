"""Data sets: files read, checked and registered, one file a format."""
