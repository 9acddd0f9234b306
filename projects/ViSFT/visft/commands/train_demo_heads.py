"""`tools/train_demo_heads.py`: the heads that the demo starts from."""

import argparse

from visft.commands.tool import add_opts, add_resume, tool
from visft.utils.cli import RESUME

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
add_resume(parser, "--run")
add_opts(parser)


def work(arguments: argparse.Namespace) -> None:
    """Train configs/visft_demo_heads.yaml, and write the files that ship, one a head."""
    from visft.applications import demo

    demo.train_heads(arguments)


parse = parser.parse_args
run, main = tool(parse, work, again=RESUME)
