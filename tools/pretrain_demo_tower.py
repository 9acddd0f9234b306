#!/usr/bin/env python
"""Pretrain the demo tower `visft-tiny` on captioned emoji. You can interrupt and resume it."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("pretrain_demo_tower"))
