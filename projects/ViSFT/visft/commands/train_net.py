"""`tools/train_net.py`: names and defaults of the arguments are those of detectron2's `default_argument_parser`."""

import argparse
import os

from visft.commands.tool import add_opts, add_resume, tool
from visft.errors import ConfigError
from visft.utils.cli import RESUME

parser = argparse.ArgumentParser(
    description="Supervised fine-tuning of a CLIP vision tower: stages heads and lora, then export.",
    epilog="On two machines: --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT on the first, and the "
    "same with --machine-rank 1 on the second.",
)
parser.add_argument("--config-file", default="", metavar="FILE", help="one of configs/*.yaml")
add_resume(parser, "OUTPUT_DIR")
parser.add_argument("--eval-only", action="store_true", help="evaluate, and train nothing")
parser.add_argument(
    "--weights",
    default=argparse.SUPPRESS,  # not among detectron2's arguments
    metavar="RUN",
    help="MODEL.WEIGHTS: a run's OUTPUT_DIR, a stage's folder or a file; with --eval-only its own config is taken "
    "where --config-file is left out",
)
parser.add_argument(
    "--plan",
    action="store_true",
    default=argparse.SUPPRESS,
    help="train nothing: print parameters, memory and operations of the run, which needs neither weights, data nor GPU",
)
parser.add_argument(
    "--gpu-memory",
    type=float,
    action="append",
    default=argparse.SUPPRESS,
    metavar="GIB",
    help="with --plan: also the largest image and batch that fit in so much memory (can be repeated)",
)
parser.add_argument(
    "--output",
    default=argparse.SUPPRESS,
    metavar="FILE",
    help="with --plan: a JSON file for the figures",
)
parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on each machine")
parser.add_argument("--num-machines", type=int, default=1, metavar="N")
parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="of this machine, from 0")
parser.add_argument(
    "--dist-url",
    # A port that is the user's own: processes that were left behind then show by its being taken.
    default=f"tcp://127.0.0.1:{2**15 + 2**14 + hash(os.getuid()) % 2**14}",
    metavar="URL",
    help="where the processes of several machines meet (default: %(default)s)",
)
add_opts(parser)


def work(arguments: argparse.Namespace) -> None:
    """Train (or with --eval-only evaluate, with --plan only plan) what the config file describes."""
    if getattr(arguments, "plan", False):
        from visft.applications import plan

        plan.run(arguments)
        return
    for option in ("gpu_memory", "output"):
        if hasattr(arguments, option):
            raise ConfigError(f"--{option.replace('_', '-')} belongs to --plan, which is missing: add it")
    from visft.engine import launch

    launch.train(arguments)


parse = parser.parse_args
run, main = tool(parse, work, again=RESUME, logs="")
