#!/usr/bin/env python
"""Draw the heads' predictions on images.

tools/predict.py --weights RUN --input IMAGES... --output DIR [--config-file F]
                 [--names "red panda, wok" | FILE.txt | coco | lvis | objects365] [KEY VALUE ...]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("predict"))
