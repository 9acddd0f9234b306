"""Peak resident memory of this process, as Linux counts it."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_PROCESS = Path("/proc/self")


def peak() -> int | None:
    """Bytes, including mapped pages (VmHWM, man 5 proc); None if the system does not tell."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def reset_peak() -> None:
    """Restart from the present memory, if the system allows it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        logger.debug("the peak memory cannot be reset here, so it counts from the start of the process")
