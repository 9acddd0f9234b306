"""Progress of long work: a bar if standard error is a terminal, nothing in a log or a pipe."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_LOGGERS = ("", "detectron2", "fvcore", "visft")
"""Loggers with handlers by `setup_logger` and `basicConfig`. Their lines go above the bar."""


@contextlib.contextmanager
def bar(title: str, total: int, *, done: int = 0, unit: str = "it") -> Iterator[tqdm]:
    """A bar of the main process, with `update(n=1)`. It disappears at the end and on an error.

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


def _on_terminal(logger: logging.Logger) -> bool:
    return any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logger.handlers)
