"""Scenes of emoji on backgrounds, with masks of the visible parts and captions of counts and relations."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from demoworld import catalogue

SIZES = ((128, 128), (112, 128), (128, 112))
"""Heights and widths of scenes. The first pair is as frequent as the others together."""

MIN_VISIBLE = 0.25
"""A scene leaves out objects with a smaller visible share."""

TRAIN_BACKGROUNDS = ("plain", "gradient", "clouds", "stripes")
HELD_OUT_BACKGROUNDS = ("checks", "dots")
"""Kinds of background that only the validation split has, in one scene of three."""

_COLOURS = {
    "white": (240, 240, 240), "grey": (150, 150, 150), "black": (40, 40, 40), "red": (200, 70, 60),
    "orange": (230, 150, 70), "yellow": (235, 215, 110), "green": (110, 175, 100), "blue": (90, 140, 210),
    "purple": (150, 110, 190), "pink": (235, 165, 190), "brown": (140, 100, 70),
}  # fmt: skip
_NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight")
_IRREGULAR = {
    "person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "pairs of skis",
    "scissors": "pairs of scissors", "sandwich": "sandwiches", "couch": "couches",
    "toothbrush": "toothbrushes", "bus": "buses", "wine glass": "wine glasses", "teddy bear": "teddy bears",
}  # fmt: skip
_NO_ARTICLE = frozenset({"skis", "scissors", "broccoli"})


@dataclass(frozen=True)
class SceneObject:
    """One visible object.

    Args:
        category: index into the cast's names, by default into `catalogue.COCO_CATEGORIES`.
        emoji: index into `catalogue.catalogue()`.
        mask: `[H, W]` bool, the visible part.
    """

    category: int
    emoji: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tight box `(x, y, width, height)` of the visible part, in pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return (
            int(columns[0]),
            int(rows[0]),
            int(columns[-1] - columns[0] + 1),
            int(rows[-1] - rows[0] + 1),
        )


def _plural(name: str) -> str:
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2] not in "aeiou" else f"{name}s"


@dataclass(frozen=True)
class Cast:
    """The categories of scenes and their drawings.

    Args:
        names: of the categories.
        train, every: indices into `images` of each category's drawings: those in training scenes, and all.
        images: for each drawing, an index into `catalogue.catalogue()` and an image.
        flips: whether each image may be flipped.
    """

    names: tuple[str, ...]
    train: tuple[tuple[int, ...], ...]
    every: tuple[tuple[int, ...], ...]
    images: tuple[tuple[int, Image.Image], ...]
    flips: tuple[bool, ...]


@dataclass(frozen=True)
class Scene:
    """`image` `[H, W, 3]` uint8 RGB, its objects from front to back, its captions, and its kind of background."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    captions: tuple[str, ...]
    background: str


def count_phrase(name: str, count: int) -> str:
    """Return a number of things in words: `a dog`, `two dogs`, `an apple`, `three people`."""
    if count > 1:
        return f"{_NUMBERS[count]} {_IRREGULAR.get(name) or _plural(name)}"
    if name in _NO_ARTICLE:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def cast_of(
    categories: Sequence[tuple[str, Sequence[str]]], held_out: Sequence[Sequence[str]] | None = None
) -> Cast:
    """Return a cast of categories by name and emoji. `held_out` has further emoji of each, which training scenes do not
    show."""
    emoji, rendered = catalogue.catalogue(), catalogue.openmoji_images()
    train, every, images, flips = [], [], [], []
    for place, (_, texts) in enumerate(categories):
        indices = catalogue.drawing_indices((*texts, *(held_out[place] if held_out else ())))
        start = len(images)
        train.append(tuple(range(start, start + len(texts))))
        every.append(tuple(range(start, start + len(indices))))
        for i in indices:
            images.append((i, Image.fromarray(rendered[i], "RGBA")))
            flips.append(catalogue.may_flip(emoji[i].name))
    names = tuple(name for name, _ in categories)
    return Cast(names, tuple(train), tuple(every), tuple(images), tuple(flips))


@functools.cache
def coco_cast() -> Cast:
    """Return the cast of COCO's categories with all their drawings."""
    categories = catalogue.COCO_CATEGORIES
    return cast_of([(c.name, c.train) for c in categories], [c.held_out for c in categories])


@functools.cache
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return y, x


def _background(kind: str, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Return a background `[H, W, 3]` uint8 and the name of its main colour."""
    y, x = _grid(height, width)
    name, other = rng.choice(list(_COLOURS), 2, replace=False)
    first = np.clip(np.array(_COLOURS[name]) + rng.integers(-20, 21, 3), 0, 255).astype(np.float32)
    second = np.array(_COLOURS[other], dtype=np.float32)
    second = first + (second - first) * rng.uniform(0.15, 0.8)
    angle, frequency, phase = rng.uniform(0, 2 * math.pi), rng.uniform(6, 20), rng.uniform(0, 2 * math.pi)
    along, across = (
        x * math.cos(angle) + y * math.sin(angle),
        y * math.cos(angle) - x * math.sin(angle),
    )
    if kind == "plain":
        blend = np.zeros((height, width), np.float32)
    elif kind == "gradient":
        blend = along / 2.8 + 0.5
    elif kind == "clouds":
        cells = rng.integers(3, 9)
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        blend = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    elif kind == "stripes":
        blend = 0.5 + 0.5 * np.sin(frequency * along + phase)
    elif kind == "checks":
        blend = (np.sin(frequency * along + phase) * np.sin(frequency * across + phase) > 0).astype(
            np.float32
        )
    else:
        blend = np.clip(np.sin(frequency * along + phase) + np.sin(frequency * across + phase) - 0.9, 0, 1)
    image = first + (second - first) * blend[..., None]
    image += rng.integers(-4, 5, (height, width, 1), dtype=np.int8)
    return np.clip(image, 0, 255).astype(np.uint8), str(name)


def _layout(rng: np.random.Generator, categories: int) -> list[int]:
    """Return the categories of a scene's objects: 1 to 8 objects of 1 to 3 categories, preferably few."""
    count = int(rng.choice(np.arange(1, 9), p=(0.2, 0.22, 0.18, 0.14, 0.1, 0.08, 0.05, 0.03)))
    kinds = rng.choice(categories, min(count, int(rng.integers(1, 4))), replace=False)
    more = rng.choice(kinds, count - len(kinds))
    return [*kinds.tolist(), *more.tolist()]


def compose(rng: np.random.Generator, *, held_out: bool = False, cast: Cast | None = None) -> Scene:
    """Return one random scene.

    Args:
        rng: the only source of randomness.
        held_out: whether drawings and backgrounds that only the validation split has may occur.
        cast: the categories. None: COCO's.

    Returns:
        A scene with at least one object.
    """
    cast = cast or coco_cast()
    drawings = cast.every if held_out else cast.train
    height, width = SIZES[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
    kinds = HELD_OUT_BACKGROUNDS if held_out and rng.random() < 1 / 3 else TRAIN_BACKGROUNDS
    kind = kinds[int(rng.integers(len(kinds)))]
    canvas, colour = _background(kind, height, width, rng)
    categories = _layout(rng, len(cast.names))
    largest = {1: 80, 2: 76, 3: 68, 4: 60}.get(len(categories), 52)

    # An object is kept if enough of it is visible. The first one is in front.
    covered = np.zeros((height, width), bool)
    kept: list[tuple[SceneObject, np.ndarray, slice, slice]] = []
    for category in categories:
        drawing = int(rng.choice(drawings[category]))
        emoji, image = cast.images[drawing]
        if cast.flips[drawing] and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.5:
            image = image.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR, expand=True)
        image = image.crop(image.getchannel("A").getbbox())
        scale = rng.uniform(28, largest) / max(image.size)
        w, h = (max(4, round(side * scale)) for side in image.size)
        rgba = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
        # Up to an eighth of it may lie outside the frame.
        x, y = (
            int(rng.integers(-(side // 8), max(1, room - side + side // 8)))
            for side, room in ((w, width), (h, height))
        )
        rows, columns = slice(max(0, y), min(height, y + h)), slice(max(0, x), min(width, x + w))
        rgba_in = rgba[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
        solid = rgba_in[..., 3] > 127
        visible = solid & ~covered[rows, columns]
        if visible.sum() < max(16, MIN_VISIBLE * int((rgba[..., 3] > 127).sum())):
            continue
        covered[rows, columns] |= solid
        mask = np.zeros((height, width), bool)
        mask[rows, columns] = visible
        kept.append((SceneObject(category, emoji, mask), rgba_in, rows, columns))
    for _, rgba, rows, columns in reversed(kept):
        alpha = rgba[..., 3:].astype(np.uint16)
        under = canvas[rows, columns]
        canvas[rows, columns] = (rgba[..., :3] * alpha + under * (255 - alpha) + 127) // 255
    objects = tuple(entry[0] for entry in kept)
    return Scene(canvas, objects, captions_of(objects, colour, rng, cast.names), kind)


def captions_of(
    objects: Sequence[SceneObject],
    colour: str,
    rng: np.random.Generator,
    categories: Sequence[str] = tuple(category.name for category in catalogue.COCO_CATEGORIES),
) -> tuple[str, ...]:
    """Return three captions: the objects, their relation or place, and their background."""
    groups: dict[int, list[SceneObject]] = {}
    for item in objects:
        groups.setdefault(item.category, []).append(item)
    names = {c: count_phrase(categories[c], len(items)) for c, items in groups.items()}
    listed = list(names.values())
    listing = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    centres = {c: np.mean([_centre(item) for item in items], axis=0) for c, items in groups.items()}
    if len(groups) == 1:
        (only,) = groups
        y, x = centres[only]
        height, width = objects[0].mask.shape
        side = "left" if x < 0.4 * width else "right" if x > 0.6 * width else ""
        level = "top" if y < 0.4 * height else "bottom" if y > 0.6 * height else ""
        place = f"at the {' '.join(p for p in (level, side) if p)}" if level or side else "in the middle"
        related = f"{names[only]} {place}"
    else:
        first, second = (int(c) for c in rng.choice(list(groups), 2, replace=False))
        dy, dx = centres[first] - centres[second]
        if abs(dx) >= abs(dy):
            relation = "to the left of" if dx < 0 else "to the right of"
        else:
            relation = "above" if dy < 0 else "below"
        related = f"{names[first]} {relation} {names[second]}"
    article = "an" if colour[0] in "aeiou" else "a"
    return listing, related, f"{listing} on {article} {colour} background"


def _centre(item: SceneObject) -> tuple[float, float]:
    x, y, w, h = item.box
    return y + h / 2, x + w / 2
