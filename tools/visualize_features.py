#!/usr/bin/env python
"""Draw a CLIP tower's features for your own images, before and after tuning.

tools/visualize_features.py --model NAME --pretrained TAG_OR_FILE [--compare FILE ...] --input IMAGES...
    [--texts "a cat, grass"] [--templates "a photo of {}." ...] [--side PIXELS] [--output DIR]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("visualize_features"))
