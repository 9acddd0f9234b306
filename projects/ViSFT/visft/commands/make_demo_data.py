"""`tools/make_demo_data.py`: the demo world as COCO files."""

import argparse

from visft.commands.tool import tool

parser = argparse.ArgumentParser(
    description="Make the demo world: scenes of OpenMoji emoji (CC BY-SA 4.0) as COCO files."
)
parser.add_argument(
    "--output",
    help="folder to make (default: $VISFT_DEMO_DATA, or visft_demo in $DETECTRON2_DATASETS, or in datasets)",
)
parser.add_argument("--num-train", type=int, default=4000)
parser.add_argument("--num-val", type=int, default=500)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--first-train",
    type=int,
    help="number of the first training scene (default: the first that the shipped heads were not trained on)",
)


def work(arguments: argparse.Namespace) -> None:
    """Make it, and print the folder."""
    from demoworld import dataset
    from visft.data.datasets import demo_world

    numbers = {"num_train": arguments.num_train, "num_val": arguments.num_val, "seed": arguments.seed}
    if arguments.first_train is not None:
        numbers["first_train"] = arguments.first_train
    print(dataset.make(arguments.output or demo_world.default_root(), **numbers).root)


parse = parser.parse_args
run, main = tool(parse, work)
