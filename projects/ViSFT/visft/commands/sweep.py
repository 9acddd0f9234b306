"""`tools/sweep.py`: an ablation."""

import argparse
from collections.abc import Sequence

from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Train and measure every run of a sweep; the same command again continues it."
    )
    parser.add_argument("--config", required=True, help="the sweep's YAML file, as configs/sweeps/tasks.yaml")
    parser.add_argument(
        "--output", required=True, help="folder for the runs, results.json, table.md and sweep.png"
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Train, measure, compare; status 1 also where a run has failed."""
    from visft.applications import sweep

    console.plain()
    return cli.guard(sweep.run, arguments.config, arguments.output, again=cli.SAME)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
