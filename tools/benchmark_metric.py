#!/usr/bin/env python
"""How long faster-coco-eval and pycocotools (or the lvis package) take to score the same detections.

tools/benchmark_metric.py [--format coco|lvis] [--images N] [--detections N] [--classes N] [--repeats N]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("benchmark_metric"))
