"""`tools/pretrain_demo_tower.py`: the demo tower's pretraining."""

import argparse

from visft.commands.tool import add_resume, tool
from visft.utils.cli import RESUME

ALONE = True

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
add_resume(parser, "--output")
parser.add_argument(
    "--pictures", action="append", default=[], help="folder of another vendor's images to train on"
)
parser.add_argument("--held-out-pictures", action="append", default=[], help="the same, for evaluation alone")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--lr", type=float, help="learning rate (default: that of the shipped tower)")
parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")


def work(arguments: argparse.Namespace) -> None:
    """Pretrain, and print the file of the weights."""
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
        images=arguments.pictures,
        held_out_images=arguments.held_out_pictures,
    )
    print(run.run())


parse = parser.parse_args
run, main = tool(parse, work, again=RESUME, logs="%(asctime)s %(message)s")
