#!/usr/bin/env python
"""An ablation: train and measure every run of a sweep, and draw what helps what.

tools/sweep.py --config configs/sweeps/tasks.yaml --output DIR     (again: continues)
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("sweep"))
