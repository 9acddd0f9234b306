"""`tools/build_vocabulary.py`: the words of a caption head."""

import argparse
from collections.abc import Sequence

from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Build the vocabulary of a caption head from captions: the most frequent words first, then by "
        "alphabet."
    )
    parser.add_argument(
        "--captions",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="caption files, or registered data sets",
    )
    parser.add_argument("--output", default="vocabulary.json", help="the file to write")
    parser.add_argument("--min-count", type=int, default=5, help="how often a word must occur")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Build, write, and print the file's path."""
    from visft.data.caption_vocabulary import write_vocabulary

    console.plain()
    return cli.guard(lambda: print(write_vocabulary(arguments)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
