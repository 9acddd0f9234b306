"""`tools/demo.py`: ViSFT in miniature."""

import argparse

from visft.commands.tool import add_opts, add_resume, tool
from visft.utils.cli import RESUME

parser = argparse.ArgumentParser(description="ViSFT in miniature: data, both stages, export, report.")
parser.add_argument("--num-train", type=int, default=4000, help="training scenes to make")
parser.add_argument("--num-val", type=int, default=200, help="validation scenes to make")
parser.add_argument("--num-unseen", type=int, default=100, help="scenes of unseen things to make")
add_resume(parser, "OUTPUT_DIR")
add_opts(parser)


def work(arguments: argparse.Namespace) -> None:
    """Make the demo world, run configs/visft_demo.yaml, and report."""
    from visft.applications import demo

    demo.run(arguments)


parse = parser.parse_args
run, main = tool(parse, work, again=RESUME)
