"""Runs a comparison of towers, from its arguments to its reports."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from towerbench import report, suite, towers
from towerbench.errors import ConfigError, DataError
from towerbench.registry import Context, resolve

logger = logging.getLogger(__name__)


def run(
    args: argparse.Namespace,
    *,
    check: Callable[[str, str, Sequence[str]], None] = towers.check,
    load: Callable[..., towers.Tower] = towers.Tower.load,
) -> dict[str, Any]:
    """Check the arguments, run the suite, write the reports, and return the content of results.json.

    Args:
        args: from `arguments.parse`.
        check: checks the architecture, the base and the tuned files before one is loaded.
        load: makes a tower from the name of an architecture, a tag or file, and a `label`.

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
    check(args.model, args.pretrained, args.compare)
    context = Context(
        images=Path(args.pictures) if args.pictures else None,
        # The absolute path, because hashes of scores contain the paths of images.
        data=Path(args.data).resolve() if args.data else None,
        split=args.split,
    )
    _check_something_runs(args.suite, {cls.name: cls.missing(context) for cls in benchmarks})
    entries = [suite.Entry("base", args.pretrained)]
    entries += [suite.Entry(*pair) for pair in zip(towers.labels(args.compare), args.compare, strict=True)]
    output = Path(args.output)
    results = suite.run(args.model, entries, benchmarks, context, seeds=args.seeds, output=output, load=load)
    report.write(results, output)
    logger.info("%s\n%s", report.text_table(results), output / "report.html")
    return results


def _check_something_runs(names: str, reasons: Mapping[str, str | None]) -> None:
    """Log at the start what is left out, and why.

    Args:
        reasons: by benchmark. None: it can be run.

    Raises:
        ConfigError: no benchmark can be run.
    """
    if len(reasons) == 1 and all(reasons.values()):
        [(name, reason)] = reasons.items()
        raise ConfigError(f"--suite {names}: nothing can be run, `{name}` {reason}")
    for name, reason in reasons.items():
        if reason:
            logger.info("not run: %s: %s", name, reason)
    if all(reasons.values()):
        raise ConfigError(f"--suite {names}: nothing can be run, for the {len(reasons)} reasons above")
