#!/usr/bin/env python
"""Build the vocabulary of a caption head from captions, by decreasing frequency, then alphabetically.

tools/build_vocabulary.py --captions captions_train2017.json [MORE_FILES_OR_DATA_SETS ...] --output vocabulary.json
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("build_vocabulary"))
