"""`tools/evaluate_backbone.py`: out-of-domain benchmarks of CLIP towers, compared in pairs."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demoworld.errors import DemoWorldError
from visft.engine import cli
from visft.errors import ConfigError, DataError
from visft.evaluation.benchmarks import Context, report, resolve, suite, towers
from visft.evaluation.benchmarks.registry import SPLITS

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Compare CLIP towers on tasks that they were not tuned on; the same command again continues."
    )
    parser.add_argument("--model", required=True, help="open_clip's name of the architecture, or visft-tiny")
    parser.add_argument(
        "--pretrained", required=True, help="the base: a tag of open_clip, or a file of the whole CLIP"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="FILE", help="tuned CLIPs of the same architecture"
    )
    parser.add_argument(
        "--suite",
        default="demo",
        help="demo; real; a family of one of them, as demo/retrieval or real/retrieval; or benchmarks; by commas. A "
        "family alone is of both suites: where --data is given, name one, since no figure is a mean over both",
    )
    parser.add_argument(
        "--pictures", help="folder of another vendor's emoji, named by code points (1f415.svg)"
    )
    parser.add_argument("--data", help="folder of the real suite's data sets")
    parser.add_argument(
        "--seeds", type=int, default=3, help="views, shots and readouts are drawn so many times"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="development: to choose a recipe by")
    parser.add_argument(
        "--output", required=True, help="folder for results.json, report.md, report.html, forest.png"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("visft").setLevel(
        logging.INFO
    )  # open_clip tells much of every model it builds, at the root
    return cli.guard(run, args, again=cli.SAME, errors=(DemoWorldError,))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments, run the suite, write the reports; returns what is in results.json.

    Raises:
        ConfigError, DataError, CheckpointError: an argument, a data set or a weight file is wrong.
    """
    if args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds}: at least 1 is needed")
    for option, folder in (("--pictures", args.pictures), ("--data", args.data)):
        if folder and not Path(folder).is_dir():
            raise DataError(f"{option} {folder}: there is no such folder")
    benchmarks = resolve(args.suite)
    if args.data and len({cls.suite for cls in benchmarks}) > 1:
        raise ConfigError(
            f"--suite {args.suite}: names benchmarks of the demo suite and of the real one, whose mean would be a "
            "figure of neither; give demo/FAMILY or real/FAMILY for a family, and one suite a run"
        )
    towers.check(args.model, args.pretrained, args.compare)
    context = Context(
        pictures=Path(args.pictures) if args.pictures else None,
        # In full: hashes of scores contain the paths of pictures.
        data=Path(args.data).resolve() if args.data else None,
        split=args.split,
    )
    _check_something_runs(args.suite, {cls.name: cls.missing(context) for cls in benchmarks})
    entries = [suite.Entry("base", args.pretrained)]
    entries += [suite.Entry(*pair) for pair in zip(towers.labels(args.compare), args.compare, strict=True)]
    output = Path(args.output)
    results = suite.run(args.model, entries, benchmarks, context, seeds=args.seeds, output=output)
    report.write(results, output)
    logger.info("%s\n%s", report.text_table(results), output / "report.html")
    return results


def _check_something_runs(names: str, reasons: Mapping[str, str | None]) -> None:
    """Tell what is left out and why, before hours pass.

    Args:
        reasons: by benchmark; None: it can be run.

    Raises:
        ConfigError: none can be.
    """
    if len(reasons) == 1 and all(reasons.values()):
        [(name, reason)] = reasons.items()
        raise ConfigError(f"--suite {names}: nothing can be run, `{name}` {reason}")
    for name, reason in reasons.items():
        if reason:
            logger.info("not run: %s: %s", name, reason)
    if all(reasons.values()):
        raise ConfigError(f"--suite {names}: nothing can be run, for the {len(reasons)} reasons above")


if __name__ == "__main__":
    sys.exit(main())
