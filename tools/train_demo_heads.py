#!/usr/bin/env python
"""Train the stage-1 heads that the demo starts from, and write the files that ship with the package."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("train_demo_heads"))
