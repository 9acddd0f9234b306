"""`tools/export_backbone.py`: a tuned tower for open_clip and others."""

import argparse
from collections.abc import Sequence

from visft.commands.tool import add_opts, tool

FORMATS = ("open_clip", "timm", "hf", "onnx", "safetensors", "lora", "authors", "peft")
"""Keys of `visft.export.FORMATS`, which imports torch."""

parser = argparse.ArgumentParser(
    description="Write the tuned tower of a run, or a base with a LoRA file merged, for other libraries."
)
parser.add_argument(
    "--weights", required=True, help="a run's OUTPUT_DIR, or a LoRA checkpoint of ours or the authors'"
)
parser.add_argument("--format", required=True, choices=FORMATS)
parser.add_argument("--output", required=True, help="the file to write; for hf and peft a folder")
parser.add_argument(
    "--interpolate",
    nargs="+",
    metavar="A",
    help="mixtures of the weights, 0: the base's, 1: the tuned; several: the output's name gets each",
)
parser.add_argument(
    "--verify",
    action="store_true",
    help="load the file with the format's own library in a fresh process where that is not done anyway: for large "
    "towers, which are merged from file to file; it needs memory for the whole model",
)
parser.add_argument("--config-file", help="the run's; without it, what the weights say of themselves")
add_opts(parser)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; `interpolate` is a list of numbers."""
    arguments = parser.parse_args(argv)
    # argparse gives an option with several values all words up to the next option, KEY VALUE pairs too.
    words = arguments.interpolate or []
    count = next((i for i, word in enumerate(words) if not _is_number(word)), len(words))
    arguments.interpolate, arguments.opts = [float(w) for w in words[:count]], words[count:] + arguments.opts
    return arguments


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def work(arguments: argparse.Namespace) -> None:
    """Check everything, build the tower, export."""
    from detectron2.utils.logger import setup_logger

    from visft.applications import export_backbone

    setup_logger(name="visft")
    export_backbone.run(arguments)


run, main = tool(parse, work, logs="")
