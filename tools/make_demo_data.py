#!/usr/bin/env python
"""Make the demo world: scenes of OpenMoji emoji (CC BY-SA 4.0) as COCO files."""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("make_demo_data"))
