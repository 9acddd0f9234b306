"""Stops a run on SIGTERM (Slurm, spot machines) or SIGUSR1 (`sbatch --signal=USR1@120`).

During an iteration, the run finishes and saves it first. At any other time everything is saved, so it ends at once.
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

_received = 0  # the pending signal of this process
_held = False


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Within the block, SIGNALS raise Stopped (see `held`), and its message is logged."""
    global _received
    _received = 0
    owner = os.getpid()

    def receive(number: int, frame: object) -> None:
        global _received
        if os.getpid() != owner:  # a newly forked child
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
    """Within the block, a signal is pending until a caller of `requested` acts on it, or until the block ends."""
    global _held
    before, _held = _held, True
    try:
        yield
    finally:
        _held = before
    obey()


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Inside a `held` block, act on signals at once, because everything is saved."""
    global _held
    before, _held = _held, False
    try:
        obey()
        yield
    finally:
        _held = before


def requested() -> int:
    """Return the signal that any process received, or 0. All processes must call this together."""
    return max(comm.all_gather(_received)) if comm.get_world_size() > 1 else _received


def obey() -> None:
    """Raise Stopped if this process received a signal."""
    if _received:
        raise stopped(_received, "the run stops")


def stopped(number: int, how: str) -> Stopped:
    """Return the exception to raise when everything is saved."""
    name = signal.Signals(number).name
    return Stopped(number, f"{name}: {how}; everything is saved, and --resume continues from there")


@contextlib.contextmanager
def forwarded(processes: Callable[[], list[int]]) -> Iterator[None]:
    """Within the block, forward SIGNALS to other processes. Raises Stopped once they have ended.

    Args:
        processes: returns the ids of the running processes.
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
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
