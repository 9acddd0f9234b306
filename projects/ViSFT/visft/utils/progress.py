"""Progress of long work: a bar if standard error is a terminal."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")

_LINE_SECONDS = 10.0

_LOGGERS = ("", "detectron2", "fvcore", "visft")
"""Loggers with handlers by `setup_logger` and `basicConfig`. Their lines go above the bar."""


@contextlib.contextmanager
def bar(title: str, total: int, *, done: int = 0, unit: str = "it") -> Iterator[tqdm]:
    """A bar of the main process, with `update(n=1)`. It disappears at the end and on an error.

    Nothing is shown in a log or a pipe.

    Args:
        total: amount of work in `unit`s; `B`: bytes.
        done: amount of work at the start.
    """
    settings = {"total": total, "initial": done, "unit": unit, "unit_scale": unit == "B"}
    # None: only shown on a terminal.
    hidden = None if comm.is_main_process() else True
    with tqdm(desc=title, disable=hidden, leave=False, dynamic_ncols=True, **settings) as shown:
        with contextlib.ExitStack() as stack:
            if not shown.disable:
                loggers = [logging.getLogger(name) for name in _LOGGERS]
                # tqdm would add handlers to loggers without one, and lines would appear twice.
                stack.enter_context(
                    logging_redirect_tqdm([logger for logger in loggers if _on_terminal(logger)])
                )
            yield shown


def counted(results: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """Yield the results. Slow work shows a progress bar on a terminal, and otherwise a line every few seconds."""
    if not comm.is_main_process():
        yield from results
    elif sys.stderr.isatty():
        yield from tqdm(results, what, total, unit=f" {unit}", delay=0.5)
    else:
        said = time.monotonic()
        for number, result in enumerate(results, 1):
            if time.monotonic() - said > _LINE_SECONDS:
                said = time.monotonic()
                sys.stderr.write(f"{what}: {number:,} of {total:,}\n")
            yield result


def _on_terminal(logger: logging.Logger) -> bool:
    return any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logger.handlers)
