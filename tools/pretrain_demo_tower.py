#!/usr/bin/env python
"""Pretrain the demo tower `visft-tiny` on captioned emoji; may be interrupted and resumed."""

import argparse
import logging
import os
import sys

import torch

from demoworld.errors import DemoWorldError
from demoworld.pretrain import Pretraining, Settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", required=True, help="folder of the run: checkpoint, log, and in the end the weights"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--samples", type=int, default=0, help="length in pictures; repeatable to the bit")
    length.add_argument(
        "--minutes", type=float, default=0, help="length in minutes of training; follows the clock"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, if there is one"
    )
    parser.add_argument(
        "--pictures", action="append", default=[], help="folder of another vendor's pictures to train on"
    )
    parser.add_argument(
        "--held-out-pictures", action="append", default=[], help="the same, for evaluation alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = None
        if args.samples or args.minutes:
            settings = Settings(samples=args.samples, minutes=args.minutes, lr=args.lr, seed=args.seed)
        run = Pretraining(
            args.output,
            settings,
            resume=args.resume,
            pictures=args.pictures,
            held_out_pictures=args.held_out_pictures,
        )
        print(run.run())
    except DemoWorldError as error:
        if os.environ.get("VISFT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
