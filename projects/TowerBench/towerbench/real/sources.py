"""Images and annotations on disk. All benchmarks of the real suite share this module."""

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
        needs: for each thing that is needed, its path below `--data`. Alternatives are separated by `|`.
    """

    suite = "real"
    max_seeds = 1
    """Nothing is random, unless a subclass says otherwise."""

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
        """Return the first of the alternatives that exists below `--data`."""
        found = [self.context.data / path for path in paths.split("|")]
        return next((path for path in found if path.exists()), found[0])


@dataclass(frozen=True)
class Source:
    """An encoded image: a file, or a part of one.

    Args:
        offset, size: of the part in bytes. With size None, it is the whole file.
    """

    file: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return the encoded bytes.

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
    """Turn errors of readers and of the system within the block into a DataError that names `what` and its kind."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, csv.Error, tarfile.TarError) as error:
        raise DataError(f"{what}: is no readable {kind} ({error}); {advice}") from error


def decoded(data: bytes, what: object) -> np.ndarray:
    """Decode bytes to `[H, W, 3]` uint8 RGB. `what` names them in the error.

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
    """Return a set of images from disk.

    Args:
        name: of the set, which also says what `change` does.
        annotations: files that the scores depend on. If they change, results of an earlier run are not used.
        change: makes `times` images of each decoded image `[H, W, 3]` and its number.
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
    """Return the images in a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def read_text(file: Path, advice: str = "get it again") -> str:
    """Return a text file's content, UTF-8 with or without a byte order mark.

    Args:
        advice: what to do if it cannot be read. It is the end of the error's sentence.

    Raises:
        DataError: it is no UTF-8, or is missing.
    """
    with readable(file, "text", advice):
        return file.read_text(encoding="utf-8-sig")


def read_json(file: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        DataError: it is no JSON, or is missing.
    """
    with readable(file, "JSON file"):
        return json.loads(file.read_text(encoding="utf-8"))


def field(entry: Any, key: str, file: Path, kind: type | tuple[type, ...] = object) -> Any:
    """Return `entry[key]` of a JSON file's content.

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
    """Return a dataclass with only some rows of the fields that have one row per image."""
    numbers = list(numbers)
    return replace(table, **{name: [getattr(table, name)[i] for i in numbers] for name in columns})


def train_and_held(rows: Sequence[int], one_in: int) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and those to choose by. The latter are one in `one_in`, from the first on."""
    return [row for i, row in enumerate(rows) if i % one_in], list(rows[::one_in])


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, in order. They are the same at every call."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(0).permutation(count)[:most].tolist())
