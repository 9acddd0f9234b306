"""What several processes found, brought together."""

from typing import Any

from detectron2.utils import comm


def gathered(part: Any) -> list[Any] | None:
    """The parts of all processes on the main one, None on the others."""
    comm.synchronize()
    parts = comm.gather(part)
    return parts if comm.is_main_process() else None
