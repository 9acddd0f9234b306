"""Sets of word images as they lie on disk: LMDB, and folders with a list of labels."""

import contextlib
import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from towerbench.ctc_readout import LINES
from towerbench.errors import DataError
from towerbench.features import Images
from towerbench.real import sources

logger = logging.getLogger(__name__)

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Case is not told apart, and other signs are left out of labels, as is usual on these sets (arXiv:1904.01906)."""

LONGEST = 25
"""Words of more letters are left out, as is usual."""

LABEL_FILES = (
    "test_label.txt",
    "test_label_1015.txt",
    "rec_gt_test.txt",
    "labels.txt",
    "label.txt",
    "gt.txt",
)
"""Lists of labels that are known, in a folder of images: of MMOCR, PaddleOCR and others."""

SIDE = 448
"""Of the square that LINES words share."""


@dataclass(frozen=True)
class WordSet:
    """Word images with their labels.

    Args:
        name: what it is, with all that decides the images besides `files`.
        labels: of letters of LETTERS alone, at least one.
        read: yields the images `[H, W, 3]` in order.
        files: what it is read from.
    """

    name: str
    labels: Sequence[str]
    read: Callable[[], Iterator[np.ndarray]]
    files: Sequence[Path] = ()

    def images(self) -> Images:
        """`LINES` words an image, each in a line of its own, for `ctc_readout.columns`; the last fills its image."""
        digest = hashlib.sha256(repr((self.name, SIDE, LINES, self.labels)).encode())
        for file in self.files:
            about = file.stat()
            digest.update(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())

        def make() -> Iterator[np.ndarray]:
            rows: list[np.ndarray] = []
            for image in self.read():
                rows.append(line(image))
                if len(rows) == LINES:
                    yield np.concatenate(rows)
                    rows = []
            if rows:
                # What stands beside a word is seen with it: rather a word than nothing.
                yield np.concatenate(rows + rows[-1:] * (LINES - len(rows)))

        key = f"{self.name}/{digest.hexdigest()[:16]}"
        return Images(key, -(-len(self.labels) // LINES), make, scale=2.0, dense=True)


def line(image: np.ndarray) -> np.ndarray:
    """A word image as large as it fits into the middle of a line, on its mean colour: `[SIDE / LINES, SIDE, 3]`."""
    height, width = SIDE // LINES, SIDE
    factor = min(height / image.shape[0], width / image.shape[1])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    ground = tuple(int(v) for v in image.mean((0, 1)).round())
    found = Image.new("RGB", (width, height), ground)
    place = (width - size[0]) // 2, (height - size[1]) // 2
    found.paste(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), place)
    return np.array(found)


def letters(label: str) -> str:
    """A label as it is compared: lower case, accents taken off, letters and digits alone."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return "".join(c for c in plain if c in LETTERS)


def is_database(folder: Path) -> bool:
    """Whether a folder is an LMDB."""
    return (folder / "data.mdb").exists()


def needs_package(folder: Path) -> str | None:
    """What has to be installed to read a folder; None: nothing."""
    return "needs lmdb (pip install 'visft[eval]')" if is_database(folder) and not find_spec("lmdb") else None


def word_set(name: str, folder: Path) -> WordSet:
    """All words of a folder whose labels have letters or digits.

    Raises:
        DataError: it is neither an LMDB nor a folder with a list of labels, or broken.
    """
    labelled = database(folder) if is_database(folder) else listed_words(folder)
    texts = labelled.texts
    kept = [i for i, text in enumerate(texts) if 0 < len(letters(text)) <= LONGEST]
    if len(kept) < len(texts):
        logger.warning(
            "%s: %d of %d words are left out: no letter or digit, or more than %d",
            folder,
            len(texts) - len(kept),
            len(texts),
            LONGEST,
        )
    if not kept:
        raise DataError(f"{folder}: none of its {len(texts)} labels has a letter or digit; get the set again")
    found = [letters(texts[i]) for i in kept]
    return WordSet(f"words/{name}", found, lambda: labelled.read(kept), labelled.files)


@dataclass(frozen=True)
class Labelled:
    """What a folder holds.

    Args:
        texts: the labels as they are written.
        read: yields the images of some numbers of labels.
        files: what it is read from.
    """

    texts: Sequence[str]
    read: Callable[[Sequence[int]], Iterator[np.ndarray]]
    files: Sequence[Path]


# ---------------------------------------------------------------- folders


def listed_words(folder: Path) -> Labelled:
    """A folder with a list of labels, one a line: the image's file, a tab or a space, the label.

    Files are below the folder, or below the one that it is in, as PaddleOCR writes them.

    Raises:
        DataError: there is no list, or a line of it has no label or names a file that is not there.
    """
    found = [folder / name for name in LABEL_FILES if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"{folder}: holds neither data.mdb nor a list of labels ({', '.join(LABEL_FILES)}); add one of them"
        )
    file = found[0]
    lines = sources.read_text(file).splitlines()
    files, texts = [], []
    for number, row in enumerate(lines, 1):
        if not row.strip():
            continue
        name, _, text = row.partition("\t" if "\t" in row else " ")
        if not text.strip():
            raise DataError(
                f"{file}: line {number} is `{row[:60]}`; `FILE LABEL` was expected, with a tab or a space between; "
                "mend the line"
            )
        places = [folder / name, folder.parent / name]
        there = next((place for place in places if place.is_file()), None)
        if there is None:
            raise DataError(
                f"{file}: line {number} names {name}, which is neither in {places[0].parent} nor in "
                f"{places[1].parent}; complete the set"
            )
        files.append(there)
        texts.append(text.strip())
    if not files:
        raise DataError(f"{file}: has no line; get it again")

    def read(numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for i in numbers:
            yield sources.decoded(sources.Source(files[i]).read(), files[i])

    return Labelled(texts, read, [file, *files])


# ---------------------------------------------------------------- LMDB


def database(folder: Path, most: int | None = None) -> Labelled:
    """An LMDB of `num-samples` images `image-000000001`, ... and labels `label-000000001`, ...

    Args:
        most: so many words of it at most, spread over it, the same ones every time; None: all.

    Raises:
        DataError: it is truncated or no LMDB, has not what `num-samples` says, or a label that is no UTF-8.
    """
    file = folder / "data.mdb"
    with _opened(folder) as get:
        count = _count(file, get)
        numbers = [i + 1 for i in sources.spread(count, count if most is None else most)]
        texts = []
        for number in numbers:
            for kind in ("label", "image"):
                if get(f"{kind}-{number:09d}") is None:
                    raise DataError(
                        f"{file}: has no `{kind}-{number:09d}`, and `num-samples` says {count}; get it again"
                    )
            try:
                texts.append(get(f"label-{number:09d}").decode())
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}: `label-{number:09d}` is no UTF-8 ({error}); get it again"
                ) from error

    def read(chosen: Sequence[int]) -> Iterator[np.ndarray]:
        with _opened(folder) as get:
            for i in chosen:
                key = f"image-{numbers[i]:09d}"
                yield sources.decoded(get(key), f"{file}: {key}")

    return Labelled(texts, read, [file])


def size(folder: Path) -> int:
    """How many words an LMDB says it has.

    Raises:
        DataError: it is truncated or no LMDB.
    """
    with _opened(folder) as get:
        return _count(folder / "data.mdb", get)


def _count(file: Path, get: Callable[[str], bytes | None]) -> int:
    value = get("num-samples")
    if value is None or not value.isdigit() or int(value) < 1:
        raise DataError(
            f"{file}: `num-samples` is {value!r}; a number above 0 was expected; is it a set of word images?"
        )
    count = int(value)
    for kind in ("label", "image"):
        if get(f"{kind}-{count + 1:09d}") is not None:
            raise DataError(f"{file}: `num-samples` says {count}, and there are more; get it again")
    return count


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Callable[[str], bytes | None]]:
    """A function that looks a key up."""
    import lmdb

    file = folder / "data.mdb"
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise DataError(f"{file}: is no readable LMDB ({error}); get it again") from error
    with environment:
        # The file is mapped into memory: what is read beyond its end ends the process.
        whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if file.stat().st_size < whole:
            raise DataError(
                f"{file}: is truncated: {file.stat().st_size} bytes of {whole} are there; get it again"
            )
        with environment.begin() as transaction:

            def get(key: str) -> bytes | None:
                try:
                    return transaction.get(key.encode())
                except lmdb.Error as error:
                    raise DataError(f"{file}: `{key}` cannot be read ({error}); get it again") from error

            yield get
