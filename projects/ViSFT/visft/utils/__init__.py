"""What any module may use: progress bars, random numbers, precision, the cache folder."""
