"""`tools/predict.py`: what the heads of a run see on the user's own images."""

import argparse

from visft.commands.tool import add_opts, tool

parser = argparse.ArgumentParser(description="Draw what the heads see on images.")
parser.add_argument(
    "--config-file",
    default="",
    metavar="FILE",
    help="the run's own config, if left out (then --weights is needed)",
)
parser.add_argument("--input", required=True, nargs="+", metavar="IMAGE", help="images or folders of them")
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
add_opts(parser)


def work(arguments: argparse.Namespace) -> None:
    """Check, build the model, draw."""
    from visft.applications import predict

    predict.run(arguments)


parse = parser.parse_args
run, main = tool(parse, work, logs="")
