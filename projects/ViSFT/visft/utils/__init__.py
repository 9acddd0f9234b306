"""Helpers for any module: progress bars, random numbers, precision, the cache folder."""
