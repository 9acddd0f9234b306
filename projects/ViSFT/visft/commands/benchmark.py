"""`tools/benchmark.py`: speed and memory of training."""

import argparse

from visft.commands.tool import add_opts, tool

parser = argparse.ArgumentParser(
    description="Time and memory of a training iteration: joint against one iteration a task, or our way against the "
    "authors', interleaved."
)
parser.add_argument("--config-file", required=True, help="one of configs/*.yaml with the ViSFT architecture")
parser.add_argument(
    "--against",
    choices=("ratio", "reference"),
    default="ratio",
    help="compare with an iteration per task of our own (ratio), or with the authors' way (reference): part by part, "
    "in a checkout, whose tests have the recipe; stage lora",
)
parser.add_argument("--stage", choices=("heads", "lora"), default="lora", help="what trains")
parser.add_argument("--images", type=int, default=0, help="images a batch; 0: the stage's IMS_PER_BATCH")
parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one that is not")
parser.add_argument("--output", default="", help="a JSON file for the figures")
parser.add_argument(
    "--plot",
    default="",
    help="a PNG or SVG file for the plot of --against reference (default: beside --output)",
)
add_opts(parser)


def work(arguments: argparse.Namespace) -> None:
    """Measure, print the table, and write the figures if asked to."""
    from visft.applications import against_reference, speed

    (against_reference if arguments.against == "reference" else speed).run(arguments)


parse = parser.parse_args
run, main = tool(parse, work)
