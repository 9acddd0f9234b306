"""Sets of captioned images on disk: Karpathy's splits, COCO's format, DCI and Urban-1k."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from towerbench.errors import DataError
from towerbench.features import Images
from towerbench.real import sources
from towerbench.real.sources import Source, field

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionedSet:
    """Images with captions.

    Args:
        name: of the set.
        files: one per image.
        captions: of each image, at least one.
        annotations: the files that the captions come from.
    """

    name: str
    files: Sequence[Path]
    captions: Sequence[tuple[str, ...]]
    annotations: Sequence[Path]

    def part(self, name: str, numbers: Sequence[int]) -> "CaptionedSet":
        """Return some of its images as a set with another name."""
        return sources.rows_of(replace(self, name=name), numbers, "files", "captions")

    def images(self, **how: Any) -> Images:
        """Return its images. `how` has arguments of `sources.images`.

        Raises:
            DataError: a file is missing.
        """
        files = [Source(file) for file in self.files]
        return sources.images(files, self.name, annotations=self.annotations, **how)


def collected(
    name: str, rows: Iterable[tuple[Path, Iterable[str]]], annotations: Sequence[Path]
) -> CaptionedSet:
    """Return a set of images and their captions. Captions without a word are dropped, as are images without a caption.

    Raises:
        DataError: no image has a caption.
    """
    files, captions, dropped = [], [], 0
    for file, texts in rows:
        kept = tuple(text.strip() for text in texts if any(map(str.isalnum, text)))
        if kept:
            files.append(file)
            captions.append(kept)
        else:
            dropped += 1
    if dropped:
        logger.warning("%s: %d images without a caption are left out", name, dropped)
    if not files:
        raise DataError(
            f"{annotations[0]}: no image of `{name}` has a caption; is it the right file, and whole? Get it again"
        )
    return CaptionedSet(name, files, captions, annotations)


def karpathy(name: str, file: Path, image: Callable[[Mapping[str, Any]], Path]) -> CaptionedSet:
    """Return the test split of a `dataset_*.json` (arXiv:1412.2306), with all captions of an image.

    Args:
        image: returns the file of an entry of `images`.
    """

    def rows() -> Iterable[tuple[Path, Iterable[str]]]:
        for entry in field(sources.read_json(file), "images", file, list):
            if field(entry, "split", file, str) == "test":
                sentences = field(entry, "sentences", file, list)
                yield image(entry), [field(sentence, "raw", file, str) for sentence in sentences]

    return collected(name, rows(), [file])


def karpathy_flickr30k(file: Path, folder: Path) -> CaptionedSet:
    """Return Flickr30k's test split: 1,000 images of `folder`."""
    return karpathy("flickr30k test", file, lambda entry: folder / field(entry, "filename", file, str))


def karpathy_coco(file: Path, coco: Path) -> CaptionedSet:
    """Return COCO's test split: 5,000 images of val2014, which are in train2017 and val2017 under other names."""
    whole = (coco / "val2014").is_dir()

    def image(entry: Mapping[str, Any]) -> Path:
        if whole:
            return coco / field(entry, "filepath", file, str) / field(entry, "filename", file, str)
        number = f"{field(entry, 'cocoid', file, int):012d}.jpg"
        held = coco / "val2017" / number
        return held if held.exists() else coco / "train2017" / number

    return karpathy("coco karpathy test", file, image)


def coco_format(name: str, file: Path, folder: Path, domain: str | None = None) -> CaptionedSet:
    """Return captions in COCO's format, with all captions of an image.

    Args:
        domain: of nocaps: only images of this `domain`.
    """
    content = sources.read_json(file)
    captions: dict[int | str, list[str]] = {}
    for entry in field(content, "annotations", file, list):
        key = field(entry, "image_id", file, (int, str))
        captions.setdefault(key, []).append(field(entry, "caption", file, str))

    def rows() -> Iterable[tuple[Path, Iterable[str]]]:
        for entry in field(content, "images", file, list):
            if domain is None or field(entry, "domain", file, str) == domain:
                key = field(entry, "id", file, (int, str))
                yield folder / field(entry, "file_name", file, str), captions.get(key, ())

    return collected(name, rows(), [file])


def dci(splits: Path, annotations: Path, photos: Path) -> CaptionedSet:
    """Return Densely Captioned Images (arXiv:2312.08578): the images of all splits.

    The caption of an image is its short caption followed by the extra one, as in published retrieval results.

    Args:
        splits: the file that lists the names of annotation files by split.
    """
    content = sources.read_json(splits)
    if not isinstance(content, Mapping) or not all(isinstance(names, list) for names in content.values()):
        raise DataError(
            f"{splits}: is no map of splits to lists of annotation files (`train`, `valid`, `test`); get dci.tar.gz "
            "again"
        )
    files = [annotations / str(name) for name in dict.fromkeys(sum(content.values(), []))]

    def rows() -> Iterable[tuple[Path, Iterable[str]]]:
        for file in files:
            entry = sources.read_json(file)
            parts = [field(entry, key, file, str).strip() for key in ("short_caption", "extra_caption")]
            yield photos / field(entry, "image", file, str), [" ".join(parts)]

    return collected("dci", rows(), [splits, *files])


def urban1k(folder: Path) -> CaptionedSet:
    """Return Urban-1k (arXiv:2403.15378). The first line of `caption/STEM.txt` describes `image/STEM.jpg`."""
    files = sorted(file for file in (folder / "caption").glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise DataError(f"{folder / 'caption'}: holds no .txt; unpack Urban1k.zip again")

    def first_line(file: Path) -> str:
        return next(iter(sources.read_text(file, "unpack Urban1k.zip again").splitlines()), "")

    rows = ((folder / "image" / f"{file.stem}.jpg", [first_line(file)]) for file in files)
    return collected("urban-1k", rows, files)
