#!/usr/bin/env python
"""Train the stage-1 heads that the demo starts from, and write the file that ships with the package."""

import sys

from visft.engine.demo import train_heads

if __name__ == "__main__":
    sys.exit(train_heads())
