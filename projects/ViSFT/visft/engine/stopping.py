"""How a run ends when it is asked to: by SIGTERM (Slurm, spot machines) or SIGUSR1 (`sbatch --signal=USR1@120`).

An iteration that has begun is finished, and saved. At any other time nothing is unsaved, so that the run ends at once.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

from detectron2.utils import comm

from visft.errors import Stopped

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received = 0  # the signal that this process was sent, while it waits to be obeyed
_held = False


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Within it, SIGNALS raise Stopped (see `held`), which is logged in one sentence."""
    global _received
    _received = 0
    owner = os.getpid()

    def receive(number: int, frame: object) -> None:
        global _received
        if os.getpid() != owner:  # a child that was forked a moment ago
            return
        _received = number
        if not _held:
            obey()

    try:
        with _handlers(receive):
            yield
    except Stopped as stop:
        if comm.is_main_process():
            logger.warning("%s", stop)
        raise


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within it a signal waits for `requested` to be asked; at its end for nothing."""
    global _held
    before, _held = _held, True
    try:
        yield
    finally:
        _held = before
    obey()


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Within it, inside of `held`, a signal waits for nothing: everything is saved."""
    global _held
    before, _held = _held, False
    try:
        obey()
        yield
    finally:
        _held = before


def requested() -> int:
    """The signal that any of the processes was sent, or 0; they all ask at the same moment."""
    return max(comm.all_gather(_received)) if comm.get_world_size() > 1 else _received


def obey() -> None:
    """Raise Stopped if this process was sent a signal."""
    if _received:
        raise stopped(_received, "the run stops")


def stopped(number: int, how: str) -> Stopped:
    """What is raised when everything is saved."""
    name = signal.Signals(number).name
    return Stopped(number, f"{name}: {how}; all of it is saved, and --resume goes on from there")


@contextlib.contextmanager
def forwarded(processes: Callable[[], list[int]]) -> Iterator[None]:
    """Within it, SIGNALS go to other processes, whose end this one waits for; Stopped is raised once they have ended.

    Args:
        processes: the ids of those that are there.
    """
    received = 0

    def forward(number: int, frame: object) -> None:
        nonlocal received
        received = number
        for process in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    try:
        with _handlers(forward):
            yield
    except Exception as error:
        if received:
            raise Stopped(received) from error
        raise


@contextlib.contextmanager
def _handlers(handler: Callable[[int, object], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
