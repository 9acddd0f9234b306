"""Errors of command-line tools: one sentence and exit status 1; a traceback only on request."""

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
    """Call `function` and return an exit status: 0, 1 after an error that the user can act on, 130 after Ctrl-C, or 143
    after a SIGTERM at which a run has stopped.

    Args:
        again: how to go on after Ctrl-C, for the message.

    The error's message goes to standard error as one line. Defects keep their traceback, and with `VISFT_DEBUG=1` all
    errors do.
    """
    try:
        function(*args)
    except Stopped as stop:  # the run has logged it
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
    """An error's message for the user; "" for a defect."""
    if any(kind.__module__ in _ERRORS for kind in type(error).__mro__):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"stopped from the keyboard{f' ({again})' if again else ''}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno is not None):
        return f"{error.filename or 'the system'}: {error.strerror or error}"
    return ""
