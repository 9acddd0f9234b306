"""`tools/build_vocabulary.py`: the words of a caption head."""

import argparse

from visft.commands.tool import tool

parser = argparse.ArgumentParser(
    description="Build the vocabulary of a caption head from captions: the most frequent words first, then by alphabet."
)
parser.add_argument(
    "--captions", required=True, nargs="+", metavar="SOURCE", help="caption files, or registered data sets"
)
parser.add_argument("--output", default="vocabulary.json", help="the file to write")
parser.add_argument("--min-count", type=int, default=5, help="how often a word must occur")


def work(arguments: argparse.Namespace) -> None:
    """Build, write, and print the file's path."""
    from visft.data.caption_vocabulary import write_vocabulary

    print(write_vocabulary(arguments))


parse = parser.parse_args
run, main = tool(parse, work)
