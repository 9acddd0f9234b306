"""`tools/fetch_emoji_vendors.py`: further vendors' drawings of the emoji."""

import argparse

from demoworld import vendors
from visft.commands.tool import tool

ALONE = True

parser = argparse.ArgumentParser(
    description="Fetch further vendors' drawings of the emoji by npm, for `pretrain_demo_tower.py --pictures`."
)
parser.add_argument("--output", default="output/vendors", help="gets a folder a vendor")
parser.add_argument(
    "vendors", nargs="*", default=list(vendors.VENDORS), metavar="vendor", help=", ".join(vendors.VENDORS)
)


def work(arguments: argparse.Namespace) -> None:
    """Fetch each, and print its folder."""
    for name in arguments.vendors:
        print(vendors.fetch(name, arguments.output))


parse = parser.parse_args
run, main = tool(parse, work)
