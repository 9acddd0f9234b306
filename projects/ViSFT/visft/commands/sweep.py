"""`tools/sweep.py`: an ablation."""

import argparse

from visft.commands.tool import tool
from visft.utils.cli import SAME

parser = argparse.ArgumentParser(
    description="Train and measure every run of a sweep; the same command again continues it."
)
parser.add_argument("--config", required=True, help="the sweep's YAML file, as configs/sweeps/tasks.yaml")
parser.add_argument(
    "--output", required=True, help="folder for the runs, results.json, table.md and sweep.png"
)


def work(arguments: argparse.Namespace) -> None:
    """Train, measure, compare; a run that has failed is an error in the end."""
    from visft.applications import sweep

    sweep.run(arguments.config, arguments.output)


parse = parser.parse_args
run, main = tool(parse, work, again=SAME)
