"""What every command-line tool does with errors: one sentence, exit status 1, and a traceback only when asked for."""

import os
import sys
from collections.abc import Callable

from visft.errors import Stopped

RESUME = "a training goes on with --resume"
SAME = "the same command continues"
"""How to go on after Ctrl-C, for `guard`."""

_ERRORS = ("visft.errors", "demoworld.errors", "towerbench.errors")
"""Modules of exceptions whose messages are for the user; named, not imported: `visft.utils` needs none of them."""


def guard(function: Callable[..., object], *args, again: str = "") -> int:
    """Call `function` and return an exit status: 0, or 1 after an error that the user can act on (130: Ctrl-C,
    143: SIGTERM that a run has heeded).

    Args:
        again: how to go on after Ctrl-C; empty: nothing is said of it.

    The error's message goes to standard error as one line. `VISFT_DEBUG=1` lets the exception through instead.
    Errors that are nobody's input but a defect of ours keep their traceback.
    """
    try:
        function(*args)
    except Stopped as stop:  # the run has said so in its log
        return stop.status
    except (Exception, KeyboardInterrupt) as error:
        message = _for_the_user(error, again)
        if not message or os.environ.get("VISFT_DEBUG", "") not in ("", "0"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (process {rank})"
        print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _for_the_user(error: BaseException, again: str) -> str:
    """What an error tells the user; "" of a defect."""
    if any(kind.__module__ in _ERRORS for kind in type(error).__mro__):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"stopped from the keyboard{f' ({again})' if again else ''}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno is not None):
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    return ""
