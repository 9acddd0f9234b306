#!/usr/bin/env python
"""Speed and memory of training: one pass of the tower for all heads against one iteration a task.

tools/benchmark.py --config-file F [--stage heads|lora] [--images N] [--rounds N] [--output FILE.json] [KEY VALUE ...]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("benchmark"))
