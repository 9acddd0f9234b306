#!/usr/bin/env python
"""Runs many small iterations and records memory and open files of the training process and its loader's workers.

    scripts/soak.py --folder DIR [--iterations 10000]

Half of the iterations are stage heads, half stage lora, on 12 images of 64 x 64, with a checkpoint and an evaluation
every 500. DIR must be new or empty. It gets the run, and `soak.jsonl` with a row every five seconds. The script prints,
by iteration, MiB of resident memory and open files of the training process and of its largest child. The exit status
is 1 if a process grew by more than 20 MiB or 5 files from iteration 1,000 of a stage to the stage's end.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import shapes  # noqa: E402
from tiny_run import tiny_arguments  # noqa: E402

MEMORY, FILES = 20, 5
STAGES = ("heads", "lora")


def usage(pid: int) -> tuple[float, int] | None:
    """Return resident MiB and open files of a process, or None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        return resident / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (OSError, StopIteration):
        return None


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def reached(run: Path) -> tuple[str, int]:
    """Return stage and iteration of the last row of metrics."""
    for stage in reversed(STAGES):
        file = run / stage / "metrics.json"
        rows = file.read_text().splitlines() if file.is_file() else []
        for row in reversed(rows[-3:]):
            try:
                return stage, json.loads(row)["iteration"]
            except (ValueError, KeyError):  # an incomplete line
                continue
    return "", 0


def sample(pid: int, run: Path) -> dict | None:
    """Return one row, or None if the process has ended."""
    stage, iteration = reached(run)
    main = usage(pid)
    if main is None:
        return None
    others = [found for child in descendants(pid) if (found := usage(child))]
    row = {"stage": stage, "iteration": iteration, "main": main, "others": len(others)}
    return row | {"worker": max(others)} if others else row


def growth(rows: list[dict], role: str, settled: int) -> tuple[float, int]:
    """Return the growth of a role in a stage after `settled` iterations, in MiB and files.

    This is the difference between the medians of the last and the first tenth of the rows.
    """
    kept = [row[role] for row in rows if role in row and row["iteration"] >= settled]
    part = max(1, len(kept) // 10)
    if not kept:
        return 0.0, 0

    def median(values: list) -> float:
        return sorted(values)[len(values) // 2]

    first, last = kept[:part], kept[-part:]
    return tuple(median([v[i] for v in last]) - median([v[i] for v in first]) for i in (0, 1))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=10000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.iterdir()):
        parser.error(f"{args.folder} is not empty")
    train = shapes.make(args.folder / "train", images=12, seed=0)
    test = shapes.make(args.folder / "test", images=4, seed=1)
    run, half = args.folder / "run", args.iterations // 2
    command = tiny_arguments(train, test, run) + ["DATALOADER.NUM_WORKERS", "1"]
    for stage in STAGES:
        keys = {"MAX_ITER": half, "CHECKPOINT_PERIOD": 500, "EVAL_PERIOD": 500, "BASE_LR": 0.0001}
        command += [
            w for key, value in keys.items() for w in (f"VISFT.SOLVER.{stage.upper()}.{key}", str(value))
        ]
    rows = []
    with open(args.folder / "log", "w") as log, open(args.folder / "soak.jsonl", "w") as table:
        process = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "train_net.py", *command], stdout=log, stderr=log, cwd=ROOT
        )
        while process.poll() is None:
            if (row := sample(process.pid, run)) and row["stage"]:
                rows.append(row)
                print(json.dumps(row), file=table, flush=True)
            time.sleep(5)
    if process.returncode:
        print(f"the run ended with status {process.returncode}: {args.folder / 'log'}", file=sys.stderr)
        return 1
    flat = True
    print("| stage | iteration | MiB | files | worker MiB | files |\n|---|---:|---:|---:|---:|---:|")
    settled = min(1000, half // 5)
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        marks = sorted({0, settled, *range(1000, half, 1000), half - 1})
        for row in {
            id(r): r for m in marks for r in [next((r for r in own if r["iteration"] >= m), own[-1])]
        }.values():
            cells = [
                f"{row[role][0]:.0f} | {row[role][1]}" if role in row else "- | -"
                for role in ("main", "worker")
            ]
            print(f"| {stage} | {row['iteration']} | {' | '.join(cells)} |")
        for role in ("main", "worker"):
            memory, files = growth(own, role, settled)
            flat &= memory <= MEMORY and files <= FILES
            print(
                f"{stage}, {role}: {memory:+.1f} MiB and {files:+d} files after iteration {settled}",
                file=sys.stderr,
            )
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
