"""What every command-line tool does with errors: one sentence, exit status 1, and a traceback only when asked for."""

import os
import sys
from collections.abc import Callable

from visft.errors import Stopped, VisftError

RESUME = "a training goes on with --resume"
SAME = "the same command continues"
"""How to go on after Ctrl-C, for `guard`."""


def guard(
    function: Callable[..., object],
    *args,
    again: str = "",
    errors: tuple[type[Exception], ...] = (),
    **kwargs,
) -> int:
    """Call `function` and return an exit status: 0, or 1 after an error that the user can act on (130: Ctrl-C,
    143: SIGTERM that a run has heeded).

    Args:
        again: how to go on after Ctrl-C; empty: nothing is said of it.
        errors: further ones whose message is for the user, of the packages that `function` uses.

    The error's message goes to standard error as one line. `VISFT_DEBUG=1` lets the exception through instead.
    Errors that are nobody's input but a defect of ours keep their traceback.
    """
    debug = os.environ.get("VISFT_DEBUG", "") not in ("", "0")
    try:
        function(*args, **kwargs)
    except Stopped as stop:  # the run has said so in its log
        return stop.status
    except (VisftError, *errors) as error:
        if debug:
            raise
        return _say(str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        _say(f"stopped from the keyboard{f' ({again})' if again else ''}")
        return 130
    except OSError as error:
        if debug or (error.filename is None and error.errno is None):
            raise
        return _say(f"{error.filename or 'the system'}: {error.strerror or error}")
    return 0


def _say(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 1
