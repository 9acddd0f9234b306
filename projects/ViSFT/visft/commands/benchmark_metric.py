"""`tools/benchmark_metric.py`: two implementations of average precision."""

import argparse
from collections.abc import Sequence

from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Time both implementations of average precision on drawn annotations and detections."
    )
    parser.add_argument("--format", choices=("coco", "lvis"), default="coco")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of each image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs of each, in turns")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Time both."""
    from visft.applications import metric_speed

    return cli.guard(metric_speed.run, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
