"""`tools/pretrain_demo_tower.py`: the demo tower's pretraining."""

import argparse
import logging
from collections.abc import Sequence

from demoworld.errors import DemoWorldError
from visft.utils import cli

ALONE = True


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Pretrain the demo tower `visft-tiny` on captioned emoji; may be interrupted and resumed."
    )
    parser.add_argument(
        "--output", required=True, help="folder of the run: checkpoint, log, and in the end the weights"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--samples", type=int, default=0, help="length in images; repeatable to the bit")
    length.add_argument(
        "--minutes", type=float, default=0, help="length in minutes of training; follows the clock"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, if there is one"
    )
    parser.add_argument(
        "--pictures", action="append", default=[], help="folder of another vendor's images to train on"
    )
    parser.add_argument(
        "--held-out-pictures", action="append", default=[], help="the same, for evaluation alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="learning rate (default: that of the shipped tower)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Pretrain, and print the file of the weights."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("demoworld").setLevel(logging.INFO)
    return cli.guard(_pretrain, arguments, again=cli.RESUME, errors=(DemoWorldError,))


def _pretrain(arguments: argparse.Namespace) -> None:
    import torch

    from demoworld.pretrain import Pretraining, Settings

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = None
    if arguments.samples or arguments.minutes:
        rate = {} if arguments.lr is None else {"lr": arguments.lr}
        settings = Settings(samples=arguments.samples, minutes=arguments.minutes, seed=arguments.seed, **rate)
    run = Pretraining(
        arguments.output,
        settings,
        resume=arguments.resume,
        pictures=arguments.pictures,
        held_out_images=arguments.held_out_images,
    )
    print(run.run())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))
