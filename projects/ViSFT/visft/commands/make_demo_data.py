"""`tools/make_demo_data.py`: the demo world as COCO files."""

import argparse
from collections.abc import Sequence

from demoworld.errors import DemoWorldError
from visft.commands import console
from visft.utils import cli


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
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
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Make it, and print the folder."""
    console.plain()
    return cli.guard(_make, arguments, errors=(DemoWorldError,))


def _make(arguments: argparse.Namespace) -> None:
    from demoworld import dataset
    from visft.data.datasets import demo_world

    first = dataset.SCENES_OF_HEADS + 1 if arguments.first_train is None else arguments.first_train
    numbers = {"num_train": arguments.num_train, "num_val": arguments.num_val, "first_train": first}
    print(dataset.make(arguments.output or demo_world.default_root(), **numbers, seed=arguments.seed).root)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
