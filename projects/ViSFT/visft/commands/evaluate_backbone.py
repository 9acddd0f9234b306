"""`tools/evaluate_backbone.py`: towers compared on tasks that they were not tuned on, by the package `towerbench`."""

import argparse

from towerbench.arguments import parse
from visft.commands.tool import tool
from visft.utils.cli import SAME


def work(arguments: argparse.Namespace) -> None:
    """Compare the towers. They are loaded as in training, and their maps are CLIPViT's."""
    from towerbench import command
    from visft.applications import compared_towers

    command.run(arguments, check=compared_towers.check, load=compared_towers.load)


run, main = tool(parse, work, again=SAME)
