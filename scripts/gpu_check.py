#!/usr/bin/env python
"""Checks and measures this checkout on a GPU in 9 minutes or less, with random weights and rendered images.

    scripts/gpu_check.sh [--output DIR] [--parts NAME ...]
    scripts/gpu_check.sh --device cpu --small       a dry run on the CPU, with tiny towers

Every part runs in its own process, with a time limit. If a part fails or takes too long, the table says so, and the
next one begins. DIR (output/gpu_check) gets `gpu_check.md`, `gpu_check.json` and a log per part. The exit status is 1
if a part failed. The parts are in scripts/gpu_check_parts.py.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "tests": 80,
    "equal": 50,
    "vitdet": 90,
    "stage2-L": 80,
    "stage2-g": 70,
    "stage2-E": 70,
    "compile": 60,
    "kernels": 30,
}
"""Seconds per part on a GPU. On the CPU, where only dry runs are quick, each has ten minutes."""

DRY_RUN = "**This is a dry run on a CPU. Its figures mean nothing for a GPU.**"


def device_name(device: str) -> str:
    """The name of the card or processor."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run_part(name: str, arguments: argparse.Namespace) -> dict:
    """Run a part in its own process. Returns `status` ("ok" or what went wrong), `seconds` and `rows`."""
    rows, log = arguments.output / f"{name}.jsonl", arguments.output / f"{name}.log"
    rows.unlink(missing_ok=True)
    limit = LIMITS[name] if arguments.device == "cuda" else 600
    command = [sys.executable, ROOT / "scripts" / "gpu_check_parts.py", name, arguments.device, rows]
    paths = [*map(str, sorted(ROOT.glob("projects/*"))), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if name in ("tests", "equal"):
        environment["NVIDIA_TF32_OVERRIDE"] = "0"  # compared with a CPU
    begun, status = time.monotonic(), "ok"
    with open(log, "w") as output:
        try:
            done = subprocess.run(
                [*command, *(["--small"] if arguments.small else [])],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                timeout=limit,
            )
            if done.returncode:
                last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
                status = f"failed with status {done.returncode}: {''.join(last)[:200]} ({log})"
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit} s ({log})"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    return {"status": status, "seconds": round(time.monotonic() - begun, 1), "rows": found}


def table(found: dict) -> str:
    """The figures as Markdown."""
    lines = [f"# Check on {found['device']}", ""]
    if found["dry_run"]:
        lines += [DRY_RUN, ""]
    lines += [f"torch {found['torch']}, {found['seconds']:.0f} s in all", ""]
    lines += ["| part | | figure | unit | for comparison |", "|---|---|---:|---|---|"]
    for name, part in found["parts"].items():
        for row in part["rows"]:
            cells = (name, row["what"], f"{row['figure']:.4g}", row["unit"], row["compare"])
            lines.append(f"| {' | '.join(cells)} |")
        status = part["status"].replace("|", "/")
        lines.append(f"| {name} | {status} | {part['seconds']:.0f} | s | |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny towers and images, for a dry run")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu_check")
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; `--device cpu --small` is a dry run without one")
    arguments.output = arguments.output.absolute()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {
        "device": device_name(arguments.device),
        "dry_run": arguments.device == "cpu",
        "torch": torch.__version__,
        "small": arguments.small,
        "parts": {},
    }
    begun = time.monotonic()
    for name in arguments.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found["parts"][name] = run_part(name, arguments)
        found["seconds"] = round(time.monotonic() - begun, 1)
        (arguments.output / "gpu_check.json").write_text(json.dumps(found, indent=1))
        (arguments.output / "gpu_check.md").write_text(table(found))
    print(table(found))
    return int(any(part["status"] != "ok" for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
