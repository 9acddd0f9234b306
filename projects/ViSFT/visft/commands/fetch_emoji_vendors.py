"""`tools/fetch_emoji_vendors.py`: further vendors' drawings of the emoji."""

import argparse
from collections.abc import Sequence

from demoworld import vendors
from demoworld.errors import DemoWorldError
from visft.commands import console
from visft.utils import cli

ALONE = True


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Fetch further vendors' drawings of the emoji by npm, for `pretrain_demo_tower.py --pictures`."
    )
    parser.add_argument("--output", default="output/vendors", help="gets a folder a vendor")
    parser.add_argument(
        "vendors", nargs="*", default=list(vendors.VENDORS), metavar="vendor", help=", ".join(vendors.VENDORS)
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Fetch each, and print its folder."""
    console.plain()
    return cli.guard(_fetch, arguments, errors=(DemoWorldError,))


def _fetch(arguments: argparse.Namespace) -> None:
    for name in arguments.vendors:
        print(vendors.fetch(name, arguments.output))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
