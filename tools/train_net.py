#!/usr/bin/env python
"""Train from a config file: ViSFT of a CLIP tower (stages heads and lora, then export) or a stock detector on one.

tools/train_net.py --config-file configs/visft_vit_b16.yaml --num-gpus 8 [--resume] [--eval-only] [KEY VALUE ...]
tools/train_net.py --eval-only --weights RUN [KEY VALUE ...]
tools/train_net.py --config-file F --plan [--gpu-memory GIB] [--output FILE.json] [KEY VALUE ...]    whether it fits
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("train_net"))
