#!/usr/bin/env python
"""An ablation: train and measure every run of a sweep, and draw what helps what.

tools/sweep.py --config configs/sweeps/tasks.yaml --output DIR     (again: continues)
"""

import sys

from visft.engine import sweep

if __name__ == "__main__":
    sys.exit(sweep.main())
