#!/usr/bin/env python
"""Make the demo world: scenes of OpenMoji emoji (CC BY-SA 4.0) as COCO files."""

import argparse
import logging
import os
import sys

from demoworld import dataset
from demoworld.errors import DemoWorldError
from visft.data import demo_world


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", default=None, help=f"folder to make (default: {demo_world.default_root()})"
    )
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-val", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first-train",
        type=int,
        default=dataset.SCENES_OF_HEADS + 1,
        help=f"number of the first training scene; the shipped heads were trained on 1 to {dataset.SCENES_OF_HEADS}",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        root = args.output or demo_world.default_root()
        numbers = {"num_train": args.num_train, "num_val": args.num_val, "first_train": args.first_train}
        data = dataset.make(root, **numbers, seed=args.seed)
    except DemoWorldError as error:
        if os.environ.get("VISFT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(data.root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
