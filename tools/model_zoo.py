#!/usr/bin/env python
"""List, download and verify the model zoo, and write the tables of MODEL_ZOO.md.

tools/model_zoo.py list
tools/model_zoo.py download eva_e_lora_50000
tools/model_zoo.py verify [NAME ...] [--check tables]
tools/model_zoo.py table [--rehash] [--write]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("model_zoo"))
