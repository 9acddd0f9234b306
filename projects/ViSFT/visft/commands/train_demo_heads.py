"""`tools/train_demo_heads.py`: the heads that the demo starts from."""

import argparse
from collections.abc import Sequence

from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Train the heads that the demo starts from.")
    parser.add_argument(
        "--heads", nargs="+", default=["detection", "segmentation", "captioning"], help="which ones"
    )
    parser.add_argument("--data", default="datasets/visft_demo_heads", help="folder of the scenes")
    parser.add_argument("--first-train", type=int, help="number of the first training scene")
    parser.add_argument(
        "--num-train",
        type=int,
        help="training scenes to make; with as many as the iterations read, none comes twice",
    )
    parser.add_argument("--num-val", type=int, default=500, help="validation scenes to make")
    parser.add_argument("--run", default="output/demo_heads", help="folder of the run")
    parser.add_argument("--output", help="folder for heads_demo_<head>.safetensors (default: the package's)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Train configs/visft_demo_heads.yaml, and write the files that ship, one a head."""
    from demoworld.errors import DemoWorldError
    from visft.applications import demo

    console.plain()
    return cli.guard(demo.train_heads, arguments, again=cli.RESUME, errors=(DemoWorldError,))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
