#!/usr/bin/env python
"""Export a small tower of every kind in every format, each reopened by its third party; print the table.

tests/helpers/export_table.py [--tower NAME ...] [--format NAME ...] [--in-process]

A figure is the largest relative distance between the reader's embeddings of three photographs (and of two texts, where
the format holds a text tower) and the model's own; for LoRA alone, between the updates B A.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import small_towers

import visft  # noqa: F401
from visft import export
from visft.errors import ExportError
from visft.export import verification


class Checks(logging.Handler):
    """Keeps what the last export says of its check."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("wrote %s: read by"):
            self.last = record.args


def main() -> int:
    """Export, and print one line a tower."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    towers = tuple(small_towers.TOWERS)
    parser.add_argument("--tower", nargs="+", default=towers, choices=towers)
    parser.add_argument("--format", nargs="+", default=tuple(export.FORMATS), choices=tuple(export.FORMATS))
    parser.add_argument(
        "--in-process", action="store_true", help="readers run here, not each in a process of its own"
    )
    arguments = parser.parse_args()
    checks, versions, reasons = Checks(), {}, {}
    logger = logging.getLogger("visft.export.verification")
    logger.addHandler(checks)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    print(f"| tower | {' | '.join(arguments.format)} |\n|---|{'---|' * len(arguments.format)}")
    with tempfile.TemporaryDirectory() as configs, tempfile.TemporaryDirectory() as readers:
        small_towers.register(Path(configs))
        if arguments.in_process:
            verification.read = small_towers.read_here
        else:
            verification.READER = small_towers.informed_reader(Path(readers))
        for tower in arguments.tower:
            backbone, cells = small_towers.tuned(tower), []
            for name in arguments.format:
                kind = export.FORMATS[name]
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        kind.write(backbone, Path(folder) / kind.file_name)
                    except ExportError as error:
                        cells.append("no")
                        reason = str(error).replace(f"{folder}/", "")
                        reasons.setdefault(reason, []).append(f"{tower} as {name}")
                    else:
                        _, version, distance, _ = checks.last
                        versions[name] = version
                        cells.append(f"{distance:.1e}")
            print(f"| {tower} | {' | '.join(cells)} |", flush=True)
    print(f"\nLoaders: {'; '.join(f'{name}: {version}' for name, version in versions.items())}.")
    for reason, where in reasons.items():
        print(f"- no for {', '.join(where)}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
