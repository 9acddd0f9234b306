#!/usr/bin/env python
"""Compare speed and memory of one tower pass for all heads with one iteration per task.

tools/benchmark.py --config-file F [--stage heads|lora] [--images N] [--rounds N] [--output FILE.json] [KEY VALUE ...]
tools/benchmark.py --against reference --config-file F [--images N] [--rounds N] [--output FILE.json] [--plot FILE]
    [KEY VALUE ...]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("benchmark"))
