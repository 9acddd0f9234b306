#!/usr/bin/env python
"""Build the vocabulary of a caption head from captions: the most frequent words first, then by alphabet.

tools/build_vocabulary.py --captions captions_train2017.json [MORE_FILES_OR_DATA_SETS ...] --output vocabulary.json
"""

import argparse
import logging
import sys

import visft  # noqa: F401  registers the data sets
from visft.data.vocabulary import write_vocabulary
from visft.engine import cli

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--captions",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="caption files, or registered data sets",
    )
    parser.add_argument("--output", default="vocabulary.json", help="the file to write")
    parser.add_argument("--min-count", type=int, default=5, help="how often a word must occur")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(cli.guard(lambda: print(write_vocabulary(arguments))))
