"""Reads the headers of a data set's images before training, so that bad images are found at the start.

Headers are read once and kept beside the annotation file (`FILE.image-headers`), or in the cache folder if that place
is not writable. A changed image file is read again.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image

from visft.checkpoint import files
from visft.data.images import MAX_PIXELS, Header, ImageError, annotated_as_stored, read_header
from visft.errors import DataError
from visft.utils.progress import counted
from visft.utils.user_cache import cache_folder

logger = logging.getLogger(__name__)

SUFFIX = ".image-headers"
THREADS = 16
"""Many, because reading mostly waits for the disk or the network."""

_Known = dict[str, list[int]]
"""For each file name: the file's size in bytes and modification time, then width, height and orientation."""


@dataclass(frozen=True)
class ImageRules:
    """The maximum number of pixels (VISFT.DATA.MAX_PIXELS), and whether to leave out bad images
    (DATALOADER.SKIP_BROKEN)."""

    max_pixels: int = MAX_PIXELS
    skip_broken: bool = False

    @classmethod
    def of(cls, cfg: CfgNode) -> "ImageRules":
        return cls(cfg.VISFT.DATA.MAX_PIXELS, cfg.DATALOADER.SKIP_BROKEN)


def check_images(images: Sequence[dict], rules: ImageRules, *, name: str, json_file: str = "") -> bool:
    """Check that images exist, have a readable header, and have their annotated size.

    Args:
        images: dicts with `file_name` and, if known, the annotated `width` and `height`.
        name: of the data set, for messages.
        json_file: the file beside which the headers are kept; "": they are not kept.

    Returns:
        `as_stored` for `visft.data.images.annotated_as_stored`, by a majority of the rotated images whose size is not
        ambiguous.

    Raises:
        DataError: an image is bad and `skip_broken` does not allow it, or all images are bad.
    """
    if not images:
        return False
    headers = _read(images, rules, name, json_file)
    faults, frames = [], []
    for image, header in zip(images, headers, strict=True):
        try:
            if isinstance(header, ImageError):
                raise header
            stored = annotated_as_stored(image, header)
        except ImageError as error:
            faults.append(error)
        else:
            if header.orientation > 4 and header.width != header.height and "width" in image:
                frames.append(stored)
    if faults:
        _report(faults, len(images), rules, json_file or name)
    return 2 * sum(frames) > len(frames)


def _report(faults: list[ImageError], total: int, rules: ImageRules, source: str) -> None:
    count = f"{source}: {len(faults)} of its {total} images cannot be used"
    if not rules.skip_broken or len(faults) == total:
        raise DataError(f"{count}, the first: {faults[0]}")
    first = ", ".join(str(fault).partition(": ")[0] for fault in faults[:3])
    logger.warning(
        "%s and are left out (DATALOADER.SKIP_BROKEN): %s%s", count, first, ", ..." * (len(faults) > 3)
    )


def _read(images: Sequence[dict], rules: ImageRules, name: str, json_file: str) -> list[Header | ImageError]:
    digest = files.sha256(json_file) if json_file else ""
    places = _places(json_file, digest) if json_file else []
    known = next(filter(None, (_load(place, digest) for place in places)), {})
    paths = [os.fspath(image["file_name"]) for image in images]
    read = functools.partial(_header, known=known, max_pixels=rules.max_pixels)
    Image.init()  # loads plugins, which otherwise each thread would load
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(counted(pool.map(read, paths), len(paths), f"{name}: reading image headers", "images"))
    now = {
        path: [*stat, header.width, header.height, header.orientation]
        for path, (header, stat) in zip(paths, found, strict=True)
        if isinstance(header, Header)
    }
    if places and now != known and comm.is_main_process():
        _keep(places, {"annotations": digest, "images": now})
    return [header for header, _ in found]


def _header(path: str, *, known: _Known, max_pixels: int) -> tuple[Header | ImageError, tuple[int, int]]:
    """Return the header or its error, and the size and modification time of the file."""
    state = (0, 0)
    with contextlib.suppress(OSError):  # read_header reports the error
        stat = os.stat(path)
        state = (stat.st_size, stat.st_mtime_ns)
    size, changed, width, height, orientation = known.get(path, (0, 0, 0, 0, 0))
    if width and state == (size, changed) and not 0 < max_pixels < width * height:
        return Header(width, height, orientation), state
    try:
        return read_header(path, max_pixels=max_pixels), state
    except ImageError as error:
        return error, state


def _places(json_file: str, digest: str) -> list[Path]:
    """Return the places for the headers of an annotation file's images, in order of preference."""
    return [Path(f"{json_file}{SUFFIX}"), cache_folder() / "image-headers" / f"{digest}.json"]


def _load(place: Path, digest: str) -> _Known:
    """Return the headers kept for these annotations, or nothing if the file is not valid."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        images = content["images"] if content["annotations"] == digest else {}
        return {path: entry for path, entry in images.items() if _is_entry(entry)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and all(isinstance(number, int) for number in entry)


def _keep(places: list[Path], content: dict) -> None:
    """Write to the first writable place."""
    for place in places:
        with contextlib.suppress(OSError), files.write_aside(place) as partial:
            partial.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
            return
    logger.info("the next start reads image headers again: neither %s nor %s is writable", *places)
