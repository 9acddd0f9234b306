"""Sets of word images on disk: LMDB, and folders with a list of labels."""

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
"""Case is ignored, and other signs are removed from labels, as is usual on these sets (arXiv:1904.01906)."""

LONGEST = 25
"""Words with more letters are left out, as is usual."""

LABEL_FILES = (
    "test_label.txt",
    "test_label_1015.txt",
    "rec_gt_test.txt",
    "labels.txt",
    "label.txt",
    "gt.txt",
)
"""Known names of label lists in a folder of images: those of MMOCR, PaddleOCR and others."""

SIDE = 448
"""Side of the square that LINES words share."""


@dataclass(frozen=True)
class WordSet:
    """Word images with their labels.

    Args:
        name: of the set, with everything that decides the images besides `files`.
        labels: with at least one letter, all of LETTERS.
        read: yields the images `[H, W, 3]` in order.
        files: the source of the words.
    """

    name: str
    labels: Sequence[str]
    read: Callable[[], Iterator[np.ndarray]]
    files: Sequence[Path] = ()

    def images(self) -> Images:
        """Return `LINES` words per image, each in its own line, for `ctc_readout.columns`. Copies of the last word fill
        the last image."""
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
                # The map also shows what is beside a word. It is better to show a word than nothing.
                yield np.concatenate(rows + rows[-1:] * (LINES - len(rows)))

        key = f"{self.name}/{digest.hexdigest()[:16]}"
        return Images(key, -(-len(self.labels) // LINES), make, scale=2.0, dense=True)


def line(image: np.ndarray) -> np.ndarray:
    """Return a word image as large as the middle of a line allows, on its mean colour: `[SIDE / LINES, SIDE, 3]`."""
    height, width = SIDE // LINES, SIDE
    factor = min(height / image.shape[0], width / image.shape[1])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    ground = tuple(int(v) for v in image.mean((0, 1)).round())
    found = Image.new("RGB", (width, height), ground)
    place = (width - size[0]) // 2, (height - size[1]) // 2
    found.paste(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), place)
    return np.array(found)


def letters(label: str) -> str:
    """Return a label in the form for comparisons: lower case, without accents, only letters and digits."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return "".join(c for c in plain if c in LETTERS)


def is_database(folder: Path) -> bool:
    """Whether a folder is an LMDB."""
    return (folder / "data.mdb").exists()


def needs_package(folder: Path) -> str | None:
    """Return the package that has to be installed to read a folder. None: nothing."""
    return "needs lmdb (pip install 'visft[eval]')" if is_database(folder) and not find_spec("lmdb") else None


def word_set(name: str, folder: Path) -> WordSet:
    """Return all words of a folder whose labels have letters or digits.

    Raises:
        DataError: it is neither an LMDB nor a folder with a list of labels, or is broken.
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
    """The content of a folder.

    Args:
        texts: the labels as they are written.
        read: yields the images of some numbers of labels.
        files: the source of the words.
    """

    texts: Sequence[str]
    read: Callable[[Sequence[int]], Iterator[np.ndarray]]
    files: Sequence[Path]


# ---------------------------------------------------------------- folders


def listed_words(folder: Path) -> Labelled:
    """Read a folder with a list of labels, one per line: the image's file, a tab or a space, the label.

    Files are below the folder, or below its parent, as PaddleOCR writes them.

    Raises:
        DataError: there is no list, or a line of it has no label or names a missing file.
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
    """Read an LMDB with `num-samples` images `image-000000001`, ... and labels `label-000000001`, ...

    Args:
        most: the largest number of words to read. They are spread over the LMDB and always the same. None: all.

    Raises:
        DataError: it is truncated or no LMDB, lacks an entry of `num-samples`, or has a label that is no UTF-8.
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
    """Return the number of words that an LMDB states.

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
    """Yield a function that looks up a key."""
    import lmdb

    file = folder / "data.mdb"
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise DataError(f"{file}: is no readable LMDB ({error}); get it again") from error
    with environment:
        # The file is mapped into memory. A read beyond its end would end the process.
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
