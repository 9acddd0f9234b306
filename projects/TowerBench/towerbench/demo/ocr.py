"""Words in many typefaces, read from the feature map. Typefaces and words of the test are not in the training."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from demoworld import catalogue
from towerbench import ctc_readout
from towerbench.ctc_readout import LINES
from towerbench.demo import unseen
from towerbench.features import FeatureStore, Images
from towerbench.readout import one_thread
from towerbench.registry import Benchmark, Context, register
from towerbench.standardise import Standardiser

LETTERS = "abcdefghijklmnopqrstuvwxyz"

COUNTS = {"train": 450, "validation": 75, "test": 150, "development": 150}
"""Number of images of each part."""

SIDE, SCALE = 128, 2.0

# Typefaces by package. Each family is in only one part.
TRAIN_FONTS = {
    "matplotlib": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "cmr10", "cmss10", "cmtt10", "cmb10", "cmti10",
    ),
    "font_lato": ("Lato-Regular", "Lato-Bold", "Lato-Italic", "Lato-Black"),
    "font_source_sans_pro": ("SourceSansPro-Regular", "SourceSansPro-Bold", "SourceSansPro-It"),
    "font_hanken_grotesk": ("HankenGrotesk-Regular", "HankenGrotesk-Bold", "HankenGrotesk-Italic"),
    "font_amatic_sc": ("AmaticSC-Bold",),
}  # fmt: skip
TEST_FONTS = {
    "matplotlib": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    "font_roboto": ("Roboto-Regular", "Roboto-Bold", "Roboto-Italic"),
    "font_source_serif_pro": ("SourceSerifPro-Regular", "SourceSerifPro-Bold", "SourceSerifPro-It"),
    "font_caladea": ("Caladea-Regular", "Caladea-Italic"),
    "font_manrope": ("Manrope-Regular", "Manrope-ExtraBold"),
    "font_fredoka_one": ("FredokaOne-Regular",),
}

EPOCHS = 20


def font_files(fonts: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Return the files by package and typeface. Typefaces whose package is not installed are left out."""
    found = {}
    for package, names in fonts.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        files = {}
        for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.[to]tf")):
            files.setdefault(file.stem, file)
        found |= {f"{package}/{name}": files[name] for name in names if name in files}
    return found


@functools.cache
def words() -> dict[str, tuple[str, ...]]:
    """Return words of three to seven letters from names of emoji, by part. No word is in two parts."""
    names = " ".join(emoji.name for emoji in catalogue.catalogue()).lower()
    every = sorted(set(re.findall(r"(?<![\w'’-])[a-z]{3,7}(?![\w'’-])", names)))
    parts: dict[str, list[str]] = {part: [] for part in COUNTS}
    for word in every:
        draw = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 10
        parts[("validation", "test", "development")[draw] if draw < 3 else "train"].append(word)
    return {part: tuple(found) for part, found in parts.items()}


@functools.cache
def lines(part: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Return the words of every image of a part, each with its typeface. In training, every second word is random
    letters, so that the readout learns letters."""
    rng = np.random.default_rng([13, list(COUNTS).index(part)])
    fonts = TEST_FONTS if part in ("test", "development") else TRAIN_FONTS
    faces = [f"{package}/{name}" for package, names in fonts.items() for name in names]
    found = []
    for _ in range(COUNTS[part]):
        rows = []
        for place in range(LINES):
            word = str(rng.choice(words()[part]))
            if part == "train" and place % 2:
                word = "".join(rng.choice(list(LETTERS), rng.integers(3, 8)))
            rows.append((word, str(rng.choice(faces))))
        found.append(tuple(rows))
    return tuple(found)


def inked(word: str, file: Path) -> Image.Image:
    """Render a word in a typeface, 40 units high. Values are the amount of ink. The margin is two pixels."""
    font = ImageFont.truetype(str(file), 40)
    left, top, right, bottom = (round(v) for v in font.getbbox(word))
    tile = Image.new("L", (right - left + 4, bottom - top + 4), 0)
    ImageDraw.Draw(tile).text((2 - left, 2 - top), word, fill=255, font=font)
    return tile


def drawn(rows: Sequence[tuple[str, str]], files: Mapping[str, Path], rng: np.random.Generator) -> np.ndarray:
    """Render words below each other, `[SIDE, SIDE, 3]` uint8, dark on light or light on dark, with noise."""
    light, dark = rng.integers(170, 256, 3), rng.integers(0, 90, 3)
    ground, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in ground))
    height = SIDE // LINES
    for place, (word, face) in enumerate(rows):
        tile = inked(word, files[face])
        # The width follows the number of letters. The word fits into the image's width and the line's height.
        width = min(SIDE - 4, round(len(word) * rng.uniform(15, 19)))
        tall = round(min(height - 4, max(14, tile.height * width / tile.width)) * rng.uniform(0.9, 1))
        tile = tile.resize((width, tall), Image.Resampling.LANCZOS)
        x = int(rng.integers(2, SIDE - 1 - width))
        y = place * height + int(rng.integers(1, height - tall))
        image.paste(tuple(int(v) for v in ink), (x, y), tile)
    pixels = np.asarray(image, np.float32) + rng.normal(0, 6, (SIDE, SIDE, 1))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


@register
class OcrWords(Benchmark):
    """Each image has four words. Items are images. Columns are word and character accuracy."""

    name, family, metric = "ocr words", "ocr", "mean of word and character accuracy"
    quick_seeds = 1
    readout_seconds = 18
    version = 3

    @classmethod
    def missing(cls, context: Context) -> str | None:
        wanted = sum(len(names) for fonts in (TRAIN_FONTS, TEST_FONTS) for names in fonts.values())
        found = len(font_files(TRAIN_FONTS)) + len(font_files(TEST_FONTS))
        return None if found == wanted else "needs the typefaces of pip install 'visft[demo]'"

    def images(self, seed: int) -> Mapping[str, Images]:
        return {name: _images(part) for name, part in unseen.parts(self.context.split).items()}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        parts = unseen.parts(self.context.split)
        least = SIDE // 8  # enough for seven letters
        columns = {name: torch.cat(list(ctc_readout.columns(tower, images[name], least))) for name in parts}
        standardised = Standardiser.of(columns["train"], channels=1)
        columns = {name: standardised(found) for name, found in columns.items()}
        truth = {name: [word for rows in lines(part) for word, _ in rows] for name, part in parts.items()}
        with one_thread():
            sides = ((columns[name], truth[name]) for name in ("train", "validation"))
            read = ctc_readout.trained(*sides, LETTERS, seed, EPOCHS).read(columns["test"])
        return ctc_readout.accuracies(read, truth["test"]).reshape(-1, LINES, 2).mean(1)


def _images(part: str) -> Images:
    rows = lines(part)

    def make() -> Iterator[np.ndarray]:
        files = font_files(TRAIN_FONTS) | font_files(TEST_FONTS)
        for number, each in enumerate(rows):
            yield drawn(each, files, np.random.default_rng([14, list(COUNTS).index(part), number]))

    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return Images(f"words/{part}/{SIDE}/{digest}", len(rows), make, scale=SCALE, dense=True)
