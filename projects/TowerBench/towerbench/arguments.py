"""The arguments of a comparison of towers. All imports are fast, so that `--help` answers at once."""

import argparse
from collections.abc import Sequence

SPLITS = ("test", "development")


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Parse the arguments of `command.run`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compare CLIP towers on tasks that they were not tuned on; the same command again continues.",
    )
    parser.add_argument("--model", required=True, help="open_clip's name of the architecture, or visft-tiny")
    parser.add_argument(
        "--pretrained", required=True, help="the base: a tag of open_clip, or a file of the whole CLIP"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="FILE", help="tuned CLIPs of the same architecture"
    )
    parser.add_argument(
        "--suite",
        default="demo",
        help="demo; real; a family of one of them, as demo/retrieval or real/retrieval; or benchmarks; by commas. A "
        "family alone is of both suites: where --data is given, name one, since no figure is a mean over both",
    )
    parser.add_argument(
        "--pictures", help="folder of another vendor's emoji, named by code points (1f415.svg)"
    )
    parser.add_argument("--data", help="folder of the real suite's data sets")
    parser.add_argument(
        "--seeds", type=int, default=3, help="views, shots and readouts are drawn so many times"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="development: to choose a recipe by")
    parser.add_argument(
        "--output", required=True, help="folder for results.json, report.md, report.html, forest.png"
    )
    return parser.parse_args(argv)
