"""`tools/demo.py`: ViSFT in miniature."""

import argparse
from collections.abc import Sequence

from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="ViSFT in miniature: data, both stages, export, report.")
    parser.add_argument("--num-train", type=int, default=4000, help="training scenes to make")
    parser.add_argument("--num-val", type=int, default=200, help="validation scenes to make")
    parser.add_argument("--num-unseen", type=int, default=100, help="scenes of unseen things to make")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Make the demo world, run configs/visft_demo.yaml, and say what happened."""
    from demoworld.errors import DemoWorldError
    from towerbench.errors import TowerBenchError
    from visft.applications import demo

    console.plain()
    return cli.guard(demo.run, arguments, again=cli.RESUME, errors=(DemoWorldError, TowerBenchError))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
