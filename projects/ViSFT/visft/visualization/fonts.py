"""Fonts for text in any script: matplotlib's own DejaVu Sans, and Noto's for characters that it lacks."""

import functools
import importlib.util
import logging
import unicodedata
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

logger = logging.getLogger(__name__)

PACKAGES = {
    "manimgx_fonts": "manimgx-fonts",
    "cvttf_NotoSansCJK_Regular": "cvttf-notosanscjk-regular",
}
"""Packages of fonts by module; the extra `demo` has them."""


def families(text: str) -> list[str]:
    """Families for matplotlib to draw a text with: its own, then those with the characters that it lacks."""
    missing = {c for c in text if not _joins(c)} - _characters(font_manager.findfont("DejaVu Sans"))
    found = ["sans-serif"]
    for file in _files() if missing else ():
        if missing & _characters(file):
            missing -= _characters(file)
            found.append(_registered(file))
    if missing:
        _warn("".join(sorted(missing)))
    return found


def _joins(character: str) -> bool:
    """Whether a character has no glyph of its own: joiners, selectors, controls."""
    return unicodedata.category(character) in ("Cf", "Cc") or "\ufe00" <= character <= "\ufe0f"


@functools.cache
def _warn(characters: str) -> None:
    modules = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    hint = f"; `pip install {' '.join(modules)}` has more fonts" if modules else ""
    logger.warning("no font has the characters %s, which are drawn as squares%s", characters, hint)


@functools.cache
def _files() -> tuple[str, ...]:
    """The upright fonts of PACKAGES."""
    specs = [spec for spec in map(importlib.util.find_spec, PACKAGES) if spec]
    folders = [Path(spec.submodule_search_locations[0]) for spec in specs]
    return tuple(
        str(file)
        for folder in folders
        for file in sorted(folder.glob("*.[ot]tf"))
        if "Italic" not in file.name
    )


@functools.cache
def _characters(file: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(file).get_charmap()))


@functools.cache
def _registered(file: str) -> str:
    """The family of a font file, which is registered with matplotlib."""
    font_manager.fontManager.addfont(file)
    return next(entry.name for entry in font_manager.fontManager.ttflist if entry.fname == file)
