#!/usr/bin/env python
"""Compare CLIP towers on tasks that they were not tuned on.

tools/evaluate_backbone.py --model NAME --pretrained TAG_OR_FILE [--compare FILE ...]
    --suite demo|real|demo/FAMILY|real/FAMILY|NAME[,NAME] [--pictures DIR] [--data DIR] [--seeds N]
    --output DIR     (the same command continues an interrupted run)
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("evaluate_backbone"))
