#!/usr/bin/env python
"""Fetch further vendors' drawings of the emoji by npm, for `pretrain_demo_tower.py --pictures`."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("fetch_emoji_vendors"))
