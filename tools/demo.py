#!/usr/bin/env python
"""Run ViSFT in miniature, as `make demo` does."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("demo"))
