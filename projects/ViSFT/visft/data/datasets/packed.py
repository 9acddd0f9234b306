"""Parses large annotation files once per machine. The result is kept in the user's cache, and every process maps it.

The cached file has one row of JSON per image and the end of each row. All processes share the mapped memory. Nothing
in the file is unpickled.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import orjson
from filelock import FileLock

from visft.data.datasets.coco_json import without_garbage_collection
from visft.utils.user_cache import cache_folder

logger = logging.getLogger(__name__)

SMALL = 16 * 2**20
"""Every process parses files up to this number of bytes itself, in a fraction of a second."""

_VERSION = 2

Rows = dict[str, list[bytes]]


class _UnpackableError(Exception):
    """A row that cannot be serialized."""


def row(value: object) -> bytes:
    """Serialize a row."""
    try:
        # This copies, because orjson's own bytes keep their 8 KiB buffer.
        return bytes(memoryview(orjson.dumps(value)))
    except orjson.JSONEncodeError as error:
        raise _UnpackableError(error) from error


class PackedFile:
    """A memory-mapped file of rows.

    Attributes:
        summary: of the whole file.
    """

    def __init__(self, path: str, key: dict):
        """
        Raises:
            OSError, ValueError: there is no such file, or it was made from another file.
        """
        self._arguments = (path, key)
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
        if header.get("key") != key or os.path.getsize(path) != start + header["bytes"]:
            raise ValueError(f"{path} was made from another file")
        self.summary = header["summary"]
        content = np.memmap(path, np.uint8, "r", offset=start).view(np.ndarray)
        self._rows = {}
        for name, (first, middle, last) in header["sections"].items():
            self._rows[name] = PackedRows(content[first:middle].view(np.int64), content[middle:last])

    def __reduce__(self) -> tuple:
        return PackedFile, self._arguments  # a process that is not forked maps the file again

    def rows(self, name: str) -> "PackedRows":
        """Return the rows of a section."""
        return self._rows[name]


class PackedRows(Sequence):
    """Rows of JSON in mapped memory, parsed on access."""

    def __init__(self, ends: np.ndarray, content: np.ndarray):
        self._ends, self._content = ends, content

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int):
        first = int(self._ends[index - 1]) if index else 0
        return orjson.loads(self._content[first : int(self._ends[index])].data)


def packed(path: str, kind: str, build: Callable[[], tuple[dict, Rows]]) -> PackedFile | None:
    """Return the result of `build` for a file: a summary, and rows by the name of their section.

    Only one process of a machine builds; the others wait, then map what it wrote.

    Args:
        kind: a name for the result, so that one file can have several.

    Returns:
        None for a small file, or if nothing can be kept: the folder is not writable, or a row has a number that is
        neither a float nor an int64.

    Raises:
        DataError: as in `build`.
    """
    stat = os.stat(path)
    if stat.st_size <= SMALL:
        return None
    source = os.path.realpath(path)
    key = {
        "version": _VERSION,
        "kind": kind,
        "source": source,
        "bytes": stat.st_size,
        "mtime": stat.st_mtime_ns,
    }
    target = cache_folder() / f"{kind}-{sha256(source.encode()).hexdigest()[:24]}.rows"
    try:
        with without_garbage_collection():
            return built_once(target, key, build)
    except (OSError, _UnpackableError) as error:
        logger.warning("%s: every process parses the file, because it cannot be cached (%s)", path, error)
        return None


def built_once(target: Path, key: dict, build: Callable[[], tuple[dict, Rows]]) -> PackedFile:
    """Return the packed file at `target`, which one process builds if it is not there or was made with another key.

    Raises:
        OSError: the file cannot be written.
        VisftError: as in `build`.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return PackedFile(str(target), key)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        try:
            return PackedFile(str(target), key)
        except (OSError, ValueError, KeyError, TypeError):
            _write(target, key, *build())
    return PackedFile(str(target), key)


def _write(target: Path, key: dict, summary: dict, sections: Rows) -> None:
    places, total = {}, 0
    for name, rows in sections.items():
        middle = total + 8 * len(rows)
        places[name] = (total, middle, middle + sum(map(len, rows)))
        total = -(-places[name][2] // 8) * 8  # align the next section's numbers
    header = json.dumps({"key": key, "summary": summary, "sections": places, "bytes": total}).encode()
    header += b" " * (-len(header) % 8)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for rows in sections.values():
                np.cumsum([len(row) for row in rows], dtype=np.int64).tofile(file)
                file.writelines(rows)
                file.write(b" " * (-file.tell() % 8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


class PackedMapping(Mapping):
    """A mapping whose rows are `[key, value]`."""

    def __init__(self, file: PackedFile, section: str):
        self._arguments = (file, section)
        self._rows = file.rows(section)
        self._index = {key: number for number, (key, _) in enumerate(self._rows)}

    def __reduce__(self) -> tuple:
        return PackedMapping, self._arguments

    def __getitem__(self, key):
        return self._rows[self._index[key]][1]

    def __iter__(self) -> Iterator:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index
