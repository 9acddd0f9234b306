"""What the tools have in common: the exit status, what they print, and arguments that several have."""

import argparse
import logging
from collections.abc import Callable, Sequence

from visft.utils import cli

PACKAGES = ("visft", "demoworld", "towerbench")

Parse = Callable[[Sequence[str] | None], argparse.Namespace]
Run = Callable[[argparse.Namespace], int]
Main = Callable[..., int]


def tool(
    parse: Parse, work: Callable[[argparse.Namespace], object], *, again: str = "", logs: str = "%(message)s"
) -> tuple[Run, Main]:
    """The functions `run` and `main` of a command.

    Args:
        parse: reads the arguments.
        work: does the work, and imports what it needs for that.
        again: how to go on after Ctrl-C (see `cli.guard`).
        logs: format of our packages' log lines on standard error; empty: `work` sets up its own logging.
    """

    def run(arguments: argparse.Namespace) -> int:
        """Do the work; returns the exit status."""
        if logs:
            # The level is set for our packages alone: open_clip logs every model it builds, at INFO.
            logging.basicConfig(format=logs, datefmt="%H:%M:%S")
            for package in PACKAGES:
                logging.getLogger(package).setLevel(logging.INFO)
        return cli.guard(work, arguments, again=again)

    def main(argv: Sequence[str] | None = None) -> int:
        """The command; returns its exit status."""
        return run(parse(argv))

    return run, main


def add_opts(parser: argparse.ArgumentParser) -> None:
    """The config keys and values at the end of a command line."""
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys and their values"
    )


def add_resume(parser: argparse.ArgumentParser, folder: str) -> None:
    """`--resume`, for a run in `folder`."""
    parser.add_argument(
        "--resume", action="store_true", help=f"continue the run in {folder}, if there is one"
    )
