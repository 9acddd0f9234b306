"""Weight files read by ranges, so that a file of any size passes through a process of small, constant memory.

safetensors are read, not mapped; PyTorch's archives are memory-mapped and mapped anew every so often, which gives the
pages that were touched back to the system.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import is_safetensors, map_tensors, read_shapes, require_file

CHUNK = 16 << 20
"""Bytes that are held at a time of a tensor that is only passed on."""

REMAP = 64 << 20
"""Bytes read of a mapped file after which it is mapped anew."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Types of tensors by their names in safetensors files."""


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
    """Tensors of a file by name, read when asked for. A context manager.

    Attributes:
        path: the file.
        entries: type and shape by name.
    """

    path: Path
    entries: dict[str, Entry]

    def read_bytes(self, name: str, start: int, stop: int) -> memoryview:
        """The bytes from `start` to `stop` of a tensor's values, row by row, in memory of their own."""
        raise NotImplementedError

    def chunks(self, name: str) -> Iterator[memoryview]:
        """All bytes of a tensor in order, at most `CHUNK` at a time."""
        size = self.entries[name].nbytes
        for start in range(0, size, CHUNK):
            yield self.read_bytes(name, start, min(start + CHUNK, size))

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self.entries[name]
        value = torch.empty(entry.shape, dtype=entry.dtype)
        target, start = memoryview(as_bytes(value)), 0
        for chunk in self.chunks(name):
            target[start : start + len(chunk)] = chunk
            start += len(chunk)
        return value

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """A weight file for reading by ranges; its kind is told by its content.

    Raises:
        CheckpointError: as `files.read_tensors`.
    """
    path = require_file(path)
    return _Safetensors(path) if is_safetensors(path) else _Archive(path)


def as_bytes(tensor: Tensor):
    """A contiguous tensor's values as a numpy array of bytes that shares its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class _Safetensors(TensorFile):
    def __init__(self, path: Path):
        self.path = path
        read_shapes(path)  # safetensors' own reader judges whether the file is whole
        self._file = open(path, "rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self.entries, self._starts = {}, {}
        for name, about in header.items():
            if about["dtype"] not in DTYPES:
                self.close()
                raise CheckpointError(
                    f"{path}: {name} has values of the type {about['dtype']}; expected one of {', '.join(DTYPES)}."
                )
            self.entries[name] = Entry(DTYPES[about["dtype"]], tuple(about["shape"]))
            self._starts[name] = 8 + length + about["data_offsets"][0]

    def read_bytes(self, name: str, start: int, stop: int) -> memoryview:
        view, done = memoryview(bytearray(stop - start)), 0
        self._file.seek(self._starts[name] + start)
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"{self.path}: ends within {name}; did something write to it meanwhile?"
                )
            done += count
        return view

    def close(self) -> None:
        self._file.close()


class _Archive(TensorFile):
    """PyTorch's format. What is older than its zip archives cannot be mapped and lies in memory as a whole."""

    def __init__(self, path: Path):
        self.path = path
        self._tensors: dict[str, Tensor] = map_tensors(path)
        self._touched = 0
        self.entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read_bytes(self, name: str, start: int, stop: int) -> memoryview:
        if self._touched > REMAP:
            self._tensors.clear()  # before the new mapping, so that never two are there
            self._tensors, self._touched = map_tensors(self.path, quiet=True), 0
        tensor = self._tensors[name]
        if not tensor.is_contiguous():  # a transposed or cut-out view: rare in weight files, and then a copy
            tensor = self._tensors[name] = tensor.contiguous()
        self._touched += stop - start
        return memoryview(as_bytes(tensor)[start:stop].copy())

    def close(self) -> None:
        self._tensors.clear()
