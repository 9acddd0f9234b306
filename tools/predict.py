#!/usr/bin/env python
"""Draw what the heads see on images.

tools/predict.py --weights RUN --input PICTURES... --output DIR [--config-file F]
                 [--names "red panda, wok" | FILE.txt | coco | lvis | objects365] [KEY VALUE ...]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("predict"))
