"""Text in any script: DejaVu Sans, matplotlib's own font, and Noto's where it lacks a character."""

import functools
import importlib.util
import itertools
import logging
import unicodedata
from pathlib import Path

from PIL import ImageDraw, ImageFont

logger = logging.getLogger(__name__)

PACKAGES = {
    "manimgx_fonts": "manimgx-fonts",
    "cvttf_NotoSansCJK_Regular": "cvttf-notosanscjk-regular",
}
"""Packages whose files are fonts, by module; the extra `demo` has them."""


@functools.cache
def font(size: int, path: str = "") -> ImageFont.FreeTypeFont:
    """A font of Pillow's, of `size` pixels; by default DejaVu Sans."""
    return ImageFont.truetype(path or _default(), size)


def families(text: str) -> list[str]:
    """The families that matplotlib shall draw a text with: its own, then those that have what is missing there."""
    from matplotlib import font_manager

    found = ["sans-serif"]
    for path in dict.fromkeys(path for path, _ in _runs(text)):
        if path != _default():
            found.append(_registered(path, font_manager.fontManager))
    return found


def write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, size: int, fill: str = "black"
) -> None:
    """Write a line of text by Pillow, which draws with one font at a time. `place` is its upper left corner."""
    x, baseline = place[0], place[1] + font(size).getmetrics()[0]
    for path, part in _runs(text):
        pen.text((x, baseline), part, font=font(size, path), fill=fill, anchor="ls")
        x += font(size, path).getlength(part)


def length(text: str, size: int) -> float:
    """Pixels that `write` takes for a line of text."""
    return sum(font(size, path).getlength(part) for path, part in _runs(text))


def shortened(text: str, width: float, size: int) -> str:
    """A line of text, its end left out where it is longer than `width` pixels."""
    text = " ".join(text.split())
    if length(text, size) <= width:
        return text
    while text and length(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text}…"


def _runs(text: str) -> list[tuple[str, str]]:
    """A text in parts, each with the file of the font that has its characters."""
    found: list[tuple[str, str]] = []
    missing = []
    for character in text:
        if found and (_joins(character) or character in _characters(found[-1][0])):
            path = found[-1][0]  # a word in one font, if it can be: then its letters are joined
        else:
            path = next((path for path in _files() if character in _characters(path)), "")
            if not path and not _joins(character):
                missing.append(character)
        found.append((path or _default(), character))
    if missing:
        _warn("".join(dict.fromkeys(missing)))
    groups = itertools.groupby(found, key=lambda pair: pair[0])
    return [(path, "".join(character for _, character in pairs)) for path, pairs in groups]


def _joins(character: str) -> bool:
    """Whether a character has no shape of its own: joiners, selectors, controls."""
    return unicodedata.category(character) in ("Cf", "Cc") or "\ufe00" <= character <= "\ufe0f"


@functools.cache
def _warn(characters: str) -> None:
    modules = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    hint = f"; `pip install {' '.join(modules)}` has more fonts" if modules else ""
    logger.warning("no font has the characters %s, which are drawn as squares%s", characters, hint)


@functools.cache
def _default() -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont("DejaVu Sans"))


@functools.cache
def _files() -> tuple[str, ...]:
    """DejaVu Sans, then the files of PACKAGES, upright ones."""
    found = [_default()]
    for module in PACKAGES:
        spec = importlib.util.find_spec(module)
        folder = Path(spec.submodule_search_locations[0]) if spec else Path()
        found += sorted(str(f) for f in folder.glob("*.[ot]tf") if "Italic" not in f.name) if spec else []
    return tuple(found)


@functools.cache
def _characters(path: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(path).get_charmap()))


@functools.cache
def _registered(path: str, manager) -> str:
    """The family of a font file, known to matplotlib from now on."""
    manager.addfont(path)
    return next(entry.name for entry in manager.ttflist if entry.fname == path)
