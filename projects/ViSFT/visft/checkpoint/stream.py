"""Weight files read a piece at a time, so that a file of any size passes through a process of small, constant memory.

Files are memory-mapped, and mapped anew every so often, which gives the pages that were touched back to the system.
Processes of one machine share its cache of the file, so it is read from the disk once for all of them.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from visft.checkpoint.files import map_tensors

CHUNK = 8 << 20
"""Bytes that are read of a tensor at a time."""

REMAP = 32 << 20
"""Bytes read of a mapped file after which it is mapped anew."""


@dataclass(frozen=True)
class Entry:
    """What a file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """Tensors of a safetensors or PyTorch file by name, read when asked for. A context manager.

    What is older than PyTorch's zip archives cannot be mapped and lies in memory as a whole.

    Attributes:
        path: the file.
        mapped: its tensors, whose values are read when used; other ones after each mapping.
        entries: type and shape by name.

    Raises:
        CheckpointError: as `files.read_tensors`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.mapped: dict[str, Tensor] = map_tensors(path)
        self._touched = 0
        self.entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in self.mapped.items()}

    def _parts(self, name: str) -> Iterator[Tensor]:
        """A tensor's values in order, row by row: flat, mapped, about `CHUNK` bytes at a time.

        Who holds on to a part holds on to its mapping.
        """
        entry = self.entries[name]
        step = max(1, CHUNK // entry.dtype.itemsize)
        for start in range(0, math.prod(entry.shape), step):
            if self._touched > REMAP:
                self.mapped.clear()  # before the new mapping, so that never two are there
                self.mapped, self._touched = map_tensors(self.path, quiet=True), 0
            # A transposed or cut-out view is copied, which is rare in weight files.
            self.mapped[name] = self.mapped[name].contiguous()
            part = self.mapped[name].detach().view(-1)[start : start + step]
            self._touched += part.nbytes
            yield part
            del part

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor's values, in order and in pieces, in memory of their own."""
        for part in self._parts(name):
            own = memoryview(as_bytes(part.clone()))
            del part
            yield own

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Fill `out`, of as many elements and any type and device, with a tensor's values; returns `out`."""
        flat, start = out.view(-1), 0
        for part in self._parts(name):
            flat[start : start + len(part)].copy_(part)
            start += len(part)
            del part
        return out

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self.entries[name]
        return self.read_into(name, torch.empty(entry.shape, dtype=entry.dtype))

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        self.mapped.clear()


def as_bytes(tensor: Tensor):
    """A contiguous tensor's values as a numpy array of bytes that shares its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
