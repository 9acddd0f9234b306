"""Images and annotations on disk: what all benchmarks of the real suite share."""

import contextlib
import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from towerbench.errors import DataError
from towerbench.features import Images
from towerbench.registry import Benchmark, Context

_Table = TypeVar("_Table")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


class RealBenchmark(Benchmark):
    """A benchmark on the user's data.

    Attributes:
        needs: what has to be where, by its path below `--data`; alternatives are separated by `|`.
    """

    suite = "real"
    max_seeds = 1
    """Nothing is drawn, unless a subclass says otherwise."""

    needs: Mapping[str, str] = {}

    @classmethod
    def missing(cls, context: Context) -> str | None:
        if context.data is None:
            return f"needs --data DIR with {cls._wanted(cls.needs)}"
        if context.split != "test":
            return "has no development split: no recipe is chosen by it"
        absent = {
            paths: what
            for paths, what in cls.needs.items()
            if not any((context.data / path).exists() for path in paths.split("|"))
        }
        return f"not found in {context.data}: {cls._wanted(absent)}" if absent else None

    @staticmethod
    def _wanted(needs: Mapping[str, str]) -> str:
        return ", ".join(f"{paths.replace('|', ' or ')} ({what})" for paths, what in needs.items())

    def path(self, paths: str) -> Path:
        """The first of the alternatives that is there, below `--data`."""
        found = [self.context.data / path for path in paths.split("|")]
        return next((path for path in found if path.exists()), found[0])


@dataclass(frozen=True)
class Source:
    """An encoded image: a file, or a part of one.

    Args:
        offset, size: of the part in bytes; size None: the whole file.
    """

    file: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            with open(self.file, "rb") as handle:
                handle.seek(self.offset)
                return handle.read(-1 if self.size is None else self.size)
        except OSError as error:
            raise DataError(
                f"{self.file}: cannot be read ({error.strerror}); an image was expected"
            ) from error


@contextlib.contextmanager
def readable(what: object, kind: str, advice: str = "get it again") -> Iterator[None]:
    """Turn what readers and the system raise within the block into a DataError that names `what` and its kind."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, csv.Error, tarfile.TarError) as error:
        raise DataError(f"{what}: is no readable {kind} ({error}); {advice}") from error


def decoded(data: bytes, what: object) -> np.ndarray:
    """Encoded bytes as `[H, W, 3]` uint8 RGB; `what` names them in the error.

    Raises:
        DataError: they are no image, or a broken one.
    """
    with readable(what, "image", "get the file again"):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def images(
    sources: Sequence[Source],
    name: str,
    *,
    annotations: Iterable[Path] = (),
    change: Callable[[np.ndarray, int], Iterable[np.ndarray]] | None = None,
    times: int = 1,
    fit: str = "crop",
    scale: float = 1.0,
    dense: bool = False,
) -> Images:
    """A set of images from disk.

    Args:
        name: what it is; says also what `change` does.
        annotations: files that scores depend on: where they change, results of an earlier run are not taken up.
        change: makes `times` images of each decoded one `[H, W, 3]` and its number.
    """
    digest = hashlib.sha256(name.encode())
    sizes: dict[Path, int] = {}
    for source in sources:
        if source.file not in sizes:
            sizes[source.file] = _size(source.file)
        digest.update(f"{source.file}\0{source.offset}\0{sizes[source.file]}\n".encode())
    for file in annotations:
        digest.update(f"{file}\0{_size(file)}\0{file.stat().st_mtime_ns}\n".encode())

    def make() -> Iterator[np.ndarray]:
        for number, source in enumerate(sources):
            image = decoded(source.read(), source.file)
            if change is None:
                yield image
            else:
                yield from change(image, number)

    key = f"{name}/{digest.hexdigest()[:16]}"
    return Images(key, len(sources) * times, make, fit=fit, scale=scale, dense=dense)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(
            f"{file}: there is no such file, and annotations name it; complete the data set"
        ) from error


def listed(folder: Path) -> list[Path]:
    """The images in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def read_text(file: Path, advice: str = "get it again") -> str:
    """A text file's content, UTF-8 with or without a byte order mark.

    Args:
        advice: what to do where it cannot be read, the end of the error's sentence.

    Raises:
        DataError: it is no UTF-8, or is not there.
    """
    with readable(file, "text", advice):
        return file.read_text(encoding="utf-8-sig")


def read_json(file: Path) -> Any:
    """A JSON file's content.

    Raises:
        DataError: it is no JSON, or is not there.
    """
    with readable(file, "JSON file"):
        return json.loads(file.read_text(encoding="utf-8"))


def field(entry: Any, key: str, file: Path, kind: type | tuple[type, ...] = object) -> Any:
    """`entry[key]` of what a JSON file holds.

    Raises:
        DataError: the entry has no such key, or something else under it.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind) or key not in entry:
        found = sorted(entry)[:8] if isinstance(entry, Mapping) else type(entry).__name__
        raise DataError(
            f"{file}: no usable `{key}` where one was expected (found {found}); is it the right file?"
        )
    return entry[key]


def rows_of(table: _Table, numbers: Iterable[int], *columns: str) -> _Table:
    """A dataclass with some rows alone of those of its fields that have a row an image."""
    numbers = list(numbers)
    return replace(table, **{name: [getattr(table, name)[i] for i in numbers] for name in columns})


def train_and_held(rows: Sequence[int], one_in: int) -> tuple[list[int], list[int]]:
    """Rows parted: to train on, and, one in so many from the first on, to choose by."""
    return [row for i, row in enumerate(rows) if i % one_in], list(rows[::one_in])


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, the same ones at every call, in order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(0).permutation(count)[:most].tolist())
