"""`tools/benchmark.py`: speed and memory of training."""

import argparse
from collections.abc import Sequence

from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Time and memory of a training iteration: joint against one iteration a task, interleaved."
    )
    parser.add_argument(
        "--config-file", required=True, help="one of configs/*.yaml with the ViSFT architecture"
    )
    parser.add_argument("--stage", choices=("heads", "lora"), default="lora", help="what trains")
    parser.add_argument("--images", type=int, default=0, help="images a batch; 0: the stage's IMS_PER_BATCH")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one that is not")
    parser.add_argument("--output", default="", help="a JSON file for the figures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, and write the figures if asked to."""
    from visft.applications import speed

    console.plain()
    return cli.guard(speed.run, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
