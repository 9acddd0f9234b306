"""Kills small runs again and again, half of the times while a file is being written, and resumes them to their end.

    python tests/helpers/kill_runs.py --folder DIR [--kills 100]

DIR must be new or empty. Every run that ends is compared with one that nobody killed, weights and optimizer, to the
bit; then the next one begins. Prints the figures as JSON; exit status 1 when a run failed or ended otherwise.
"""

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import processes
import runs
import shapes
from tiny_run import tiny_arguments

STAGES = ("heads", "lora")
FILES = 4  # of a checkpoint, of which there is one an iteration: trainer, model, its JSON, last_checkpoint


def arguments(train: tuple[Path, Path], run: Path) -> list[str]:
    """A run of both stages with a loader's worker."""
    keys = {"DATALOADER.NUM_WORKERS": 1}
    for stage in STAGES:
        keys |= {
            f"VISFT.SOLVER.{stage.upper()}.{key}": n for key, n in (("MAX_ITER", 4), ("CHECKPOINT_PERIOD", 1))
        }
    return [*tiny_arguments(train, None, run), *runs.words(keys)]


def half_written(run: Path) -> set[str]:
    """Temporary files in a run's folders."""
    return {str(file) for folder in (run, *run.glob("*/")) for file in folder.glob(".*.partial")}


def wait_for_files(process, run: Path, number: int) -> None:
    """Until a process has begun to write `number` files."""
    seen = half_written(run)
    while process.is_alive() and number > 0:
        found = half_written(run)
        number -= len(found - seen)
        seen = found
        if number > 0:
            time.sleep(0.0005)


def kill_and_resume(train: tuple[Path, Path], folder: Path, *, kills: int, seed: int) -> Counter:
    """Kill and resume until that many kills have struck and the last run has ended.

    Returns:
        Counts: kills `struck`, those that `left_half_written` files; `finished` runs, `broken` ones (another exit
        status), `different` ones (other bits).
    """
    runs.train(arguments(train, folder / "whole"), folder / "whole.log")
    expected = runs.end(folder / "whole", *STAGES)
    rng, counts = random.Random(seed), Counter(struck=0, left_half_written=0, broken=0, different=0)
    number, fresh = 0, True
    while counts["struck"] < kills or not fresh:
        run, log = folder / str(number), folder / f"{number}.log"
        words = arguments(train, run)
        process = processes.start("train_net.py", words if fresh else runs.option(words, "--resume"), log)
        fresh = False
        if counts["struck"] < kills:
            writing = counts["struck"] % 2
            wait_for_files(process, run, rng.randint(writing, 3 * FILES))
            process.join(0 if writing else rng.uniform(0, 0.5))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            counts["struck"] += 1
            counts["left_half_written"] += any(f".{process.pid}." in name for name in half_written(run))
            continue
        if process.exitcode:
            counts["broken"] += 1
            print(log.read_text(), file=sys.stderr)
        else:
            counts["finished"] += 1
            counts["different"] += runs.different(runs.end(run, *STAGES), expected) != []
        number, fresh = number + 1, True
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.iterdir()):
        parser.error(f"{args.folder} is not empty")
    train = shapes.make(args.folder / "train", images=12, seed=0)
    start = time.monotonic()
    counts = kill_and_resume(train, args.folder, kills=args.kills, seed=args.seed)
    print(json.dumps(counts | {"minutes": round((time.monotonic() - start) / 60, 1)}))
    return 1 if counts["broken"] or counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
