"""A safetensors file written piece by piece: header first, then values as they come; read back and compared."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch

from visft.checkpoint.stream import Entry, TensorFile
from visft.errors import CheckpointError, ExportError
from visft.utils import progress

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Names of types in safetensors files."""


@dataclass(frozen=True)
class Piece:
    """A tensor to be written.

    Attributes:
        name: in the new file.
        entry: type and shape.
        content: gives its bytes in order, anew in every call.
    """

    name: str
    entry: Entry
    content: Callable[[], Iterator[memoryview]]


def write(
    path: str | os.PathLike, pieces: Sequence[Piece], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file and sync it. `path` is half-written meanwhile: give one that is aside.

    Raises:
        ExportError: a type that the format does not have, too little space, or the disk fails.
        CheckpointError: a piece cannot be read.
    """
    path, pieces = Path(path), _ordered(pieces)
    header = _header(pieces, metadata)
    size = len(header) + sum(piece.entry.nbytes for piece in pieces)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ExportError(
            f"{path.parent}: has {free / 1e9:.1f} GB left, the export takes {size / 1e9:.1f} GB; make space."
        )
    try:
        with open(path, "wb") as file, progress.bar(f"writing {path.name}", size, unit="B") as bar:
            file.write(header)
            for piece in pieces:
                count = 0
                for chunk in piece.content():
                    file.write(chunk)
                    count += len(chunk)
                    bar.update(len(chunk))
                if count != piece.entry.nbytes:
                    raise ExportError(
                        f"{piece.name}: {count} bytes came of {piece.entry.nbytes}; nothing was exported."
                    )
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ExportError(
            f"{path}: cannot be written ({error.strerror}){'; make space' if full else ''}."
        ) from error


def verify(path: str | os.PathLike, pieces: Sequence[Piece]) -> None:
    """Read a file back, tensor by tensor, and compare it with the pieces computed once more.

    Raises:
        ExportError: safetensors does not open it; a name, type, shape or byte differs.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
        found = TensorFile(path)
    except (safetensors.SafetensorError, CheckpointError, OSError) as error:
        raise ExportError(f"What was just written does not read back: {error}") from error
    odd = names ^ {piece.name for piece in pieces}
    if odd:
        raise ExportError(f"{path.name}: {sorted(odd)[0]} is there or missing against what was written.")
    size = sum(piece.entry.nbytes for piece in pieces)
    with found, progress.bar(f"verifying {path.name}", size, unit="B") as bar:
        if hasattr(os, "posix_fadvise"):  # from the disk, not from the system's cache
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for piece in _ordered(pieces):
            if found.entries[piece.name] != piece.entry or not _same_bytes(
                found.chunks(piece.name), piece.content()
            ):
                raise ExportError(
                    f"{path.name}: {piece.name} reads back otherwise than written; is the disk sound?"
                )
            bar.update(piece.entry.nbytes)


def _same_bytes(left: Iterator[memoryview], right: Iterator[memoryview]) -> bool:
    """Whether two streams are equal, however they are cut."""
    ahead, behind = memoryview(b""), memoryview(b"")
    while True:
        ahead = ahead or next(left, memoryview(b""))
        behind = behind or next(right, memoryview(b""))
        count = min(len(ahead), len(behind))
        if not count:
            return len(ahead) == len(behind)
        if not np.array_equal(
            np.frombuffer(ahead[:count], np.uint8), np.frombuffer(behind[:count], np.uint8)
        ):
            return False
        ahead, behind = ahead[count:], behind[count:]


def _ordered(pieces: Sequence[Piece]) -> list[Piece]:
    """Wide types first: every tensor is then aligned to its type, as readers of the format expect."""
    return sorted(pieces, key=lambda piece: (-piece.entry.dtype.itemsize, piece.name))


def _header(pieces: Sequence[Piece], metadata: Mapping[str, str] | None) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for piece in pieces:
        stop = start + piece.entry.nbytes
        content[piece.name] = {
            "dtype": _type_name(piece),
            "shape": list(piece.entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _type_name(piece: Piece) -> str:
    dtype: torch.dtype = piece.entry.dtype
    if dtype not in _NAMES:
        raise ExportError(f"{piece.name}: has values of {dtype}, which safetensors files do not hold.")
    return _NAMES[dtype]
