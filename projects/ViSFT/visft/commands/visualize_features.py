"""`tools/visualize_features.py`: a tower's features of images, drawn."""

import argparse

from visft.commands.tool import tool

parser = argparse.ArgumentParser(
    description="Draw a CLIP tower's features as colours, beside texts, and matched between two images."
)
parser.add_argument("--model", required=True, help="open_clip's name of the architecture, or visft-tiny")
parser.add_argument("--pretrained", required=True, help="a tag of open_clip, or a file of the whole CLIP")
parser.add_argument(
    "--compare", nargs="+", default=[], metavar="FILE", help="tuned CLIPs of the same architecture"
)
parser.add_argument("--input", required=True, nargs="+", metavar="IMAGE", help="images or folders of them")
parser.add_argument("--texts", help='what patches are compared with, by commas: "a cat, grass"')
parser.add_argument(
    "--templates", nargs="+", default=["{}"], help='prompts, each with one {}: "a photo of {}."'
)
parser.add_argument(
    "--side",
    type=int,
    help="longer side in pixels that the tower sees, whole patches (default: twice the native side)",
)
parser.add_argument("--output", default="output/features", metavar="DIR", help="folder of the PNG files")


def work(arguments: argparse.Namespace) -> None:
    """Check, encode, draw."""
    from visft.applications import visualize_features

    visualize_features.run(arguments)


parse = parser.parse_args
run, main = tool(parse, work)
