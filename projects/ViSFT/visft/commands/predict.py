"""`tools/predict.py`: what the heads of a run see on the user's own images."""

import argparse
from collections.abc import Sequence

from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Draw what the heads see on images.")
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="the run's own config, if left out (then --weights is needed)",
    )
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="PICTURE", help="images or folders of them"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--weights",
        default="",
        help="a run's OUTPUT_DIR, a stage's folder or a file (default: MODEL.WEIGHTS, or the run in OUTPUT_DIR)",
    )
    parser.add_argument("--threshold", type=float, help="least score that is drawn (default: 0.3)")
    parser.add_argument(
        "--names",
        help="look for these instead of the classes that the heads learnt: `red panda, wok`, a .txt file with a name a "
        "line, coco, lvis or objects365",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Check, build the model, draw."""
    from visft.applications import predict

    return cli.guard(predict.run, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
