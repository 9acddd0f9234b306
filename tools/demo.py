#!/usr/bin/env python
"""ViSFT in miniature, as `make demo` runs it."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("demo"))
