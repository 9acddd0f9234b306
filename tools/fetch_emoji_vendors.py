#!/usr/bin/env python
"""Fetch other vendors' drawings of the emoji with npm, for `pretrain_demo_tower.py --pictures`."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("fetch_emoji_vendors"))
