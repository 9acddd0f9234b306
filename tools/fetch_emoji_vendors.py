#!/usr/bin/env python
"""Fetch further vendors' drawings of the emoji by npm, for `pretrain_demo_tower.py --pictures`."""

import argparse
import logging
import os
import sys

from demoworld import vendors
from demoworld.errors import DemoWorldError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/vendors", help="gets a folder a vendor")
    parser.add_argument(
        "vendors", nargs="*", default=list(vendors.VENDORS), metavar="vendor", help=", ".join(vendors.VENDORS)
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name in args.vendors:
            print(vendors.fetch(name, args.output))
    except DemoWorldError as error:
        if os.environ.get("VISFT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
