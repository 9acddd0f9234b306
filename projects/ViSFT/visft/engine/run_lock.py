"""A lock that allows only one run at a time in a folder."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

from visft.errors import TrainingError

logger = logging.getLogger(__name__)

FILE = ".lock"

_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def locked(folder: str | os.PathLike, key: str = "OUTPUT_DIR") -> Iterator[None]:
    """Within the block, no other run can enter `folder`. Every process calls this; the main one holds the lock.

    This is a POSIX lock on a file in the folder. It ends with its process, however the process ends. Unlike flock's,
    it is not inherited by loaders' workers, which outlive a killed process by seconds. NFS supports it across machines.

    Args:
        key: the config key or option that names the folder, for the message.

    Raises:
        TrainingError: another run holds the lock. The message names its machine and process.
    """
    with contextlib.ExitStack() as stack:
        refusal = _lock(Path(folder), key, stack) if comm.is_main_process() else ""
        if refusal := comm.all_gather(refusal)[0]:
            raise TrainingError(refusal)
        yield


def _lock(folder: Path, key: str, stack: contextlib.ExitStack) -> str:
    """Take the lock until the stack is closed. Returns the reason for a failure, or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    # Opened once: closing any descriptor of a file ends a process's locks on it.
    file = stack.enter_context(open(folder / FILE, "a+", encoding="utf-8"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            file.seek(0)
            return (
                f"{key} {folder}: another run is writing to it, {_owner(file.read())}; wait until it ends, stop "
                f"it, or set {key} to another folder"
            )
        logger.warning(
            "%s: this file system has no locks (%s), so a second run in %s would not be refused",
            folder / FILE,
            error.strerror,
            folder,
        )
        return ""
    file.truncate(0)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    print(json.dumps(about), file=file, flush=True)
    return ""


def _owner(text: str) -> str:
    try:
        about = json.loads(text)
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):  # the owner has not written its entry yet
        return "which has just started"
