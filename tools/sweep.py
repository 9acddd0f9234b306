#!/usr/bin/env python
"""Train and evaluate every run of a sweep, and plot which task helps which.

tools/sweep.py --config configs/sweeps/tasks.yaml --output DIR     (the same command continues an interrupted sweep)
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("sweep"))
