"""`tools/evaluate_backbone.py`: towers compared on tasks that they were not tuned on, by the package `towerbench`."""

import argparse
from collections.abc import Sequence

from towerbench import arguments
from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments: those of `python -m towerbench`."""
    return arguments.parse(argv)


def run(arguments: argparse.Namespace) -> int:
    """Compare the towers. They are loaded as in training, and their maps are CLIPViT's."""
    from demoworld.errors import DemoWorldError
    from towerbench import command
    from towerbench.errors import TowerBenchError
    from visft.applications import compared_towers

    console.plain()
    return cli.guard(
        command.run,
        arguments,
        check=compared_towers.check,
        load=compared_towers.load,
        again=cli.SAME,
        errors=(TowerBenchError, DemoWorldError),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
