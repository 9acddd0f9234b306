"""Words in many typefaces, read from the map of features: typefaces and words of the test are not those of training."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from visft.data.demo_world import catalogue

from ..features import FeatureStore, Pictures
from ..readout import one_thread
from ..registry import Benchmark, Context, register

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LINES = 4
"""Words below each other in a picture."""

COUNTS = {"train": 450, "validation": 75, "test": 150, "development": 150}
"""Pictures of each part."""

SIDE, SCALE = 128, 2.0

# By package: the typefaces that are shown. One family is in one part alone.
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

EPOCHS, BATCH, RATE = 20, 32, 3e-3
WEIGHT_DECAYS = (0.01, 0.1)
HIDDEN = 128


def font_files(fonts: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Files by package and typeface; those whose package is not installed are missing."""
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
    """Words of three to seven letters that occur in names of emoji, by part; no word is in two parts."""
    names = " ".join(emoji.name for emoji in catalogue.catalogue()).lower()
    every = sorted(set(re.findall(r"(?<![\w'’-])[a-z]{3,7}(?![\w'’-])", names)))
    parts: dict[str, list[str]] = {part: [] for part in COUNTS}
    for word in every:
        draw = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 10
        parts[("validation", "test", "development")[draw] if draw < 3 else "train"].append(word)
    return {part: tuple(found) for part, found in parts.items()}


@functools.cache
def lines(part: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """The words of every picture of a part, each with its typeface. In training every second one is letters at random,
    so that what is learned is letters."""
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


def picture(
    rows: Sequence[tuple[str, str]], files: Mapping[str, Path], rng: np.random.Generator
) -> np.ndarray:
    """Words below each other, `[SIDE, SIDE, 3]` uint8; dark on light or light on dark, with noise."""
    light, dark = rng.integers(170, 256, 3), rng.integers(0, 90, 3)
    ground, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in ground))
    height = SIDE // LINES
    for place, (word, face) in enumerate(rows):
        font = ImageFont.truetype(str(files[face]), 40)
        left, top, right, bottom = (round(v) for v in font.getbbox(word))
        tile = Image.new("L", (right - left + 4, bottom - top + 4), 0)
        ImageDraw.Draw(tile).text((2 - left, 2 - top), word, fill=255, font=font)
        # As wide as its letters ask for, but no wider than the picture and no higher than the line.
        width = min(SIDE - 4, round(len(word) * rng.uniform(15, 19)))
        tall = round(min(height - 4, max(14, tile.height * width / tile.width)) * rng.uniform(0.9, 1))
        tile = tile.resize((width, tall), Image.Resampling.LANCZOS)
        x = int(rng.integers(2, SIDE - 1 - width))
        y = place * height + int(rng.integers(1, height - tall))
        image.paste(tuple(int(v) for v in ink), (x, y), tile)
    pixels = np.asarray(image, np.float32) + rng.normal(0, 6, (SIDE, SIDE, 1))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


class Reader(nn.Module):
    """Columns of features -> letters: one hidden layer that sees a column and its neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Conv1d(channels, HIDDEN, 3, padding=1)
        self.letters = nn.Conv1d(HIDDEN, 2 * (1 + len(LETTERS)), 3, padding=1)

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        """`[N, C, w]` -> logarithmic probabilities `[2 w, N, 27]`; each column says two, the first of them is blank."""
        found = self.letters(F.relu(self.hidden(columns)))
        halves = found.unflatten(1, (2, -1)).permute(3, 1, 0, 2).flatten(0, 1)
        return halves.log_softmax(-1)


def encoded(found: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Letters of all words, one after the other, from 1; their lengths."""
    return torch.tensor([1 + LETTERS.index(c) for word in found for c in word]), torch.tensor(
        [len(word) for word in found]
    )


def spelled(scores: torch.Tensor) -> list[str]:
    """The most probable path of each `[T, N, 27]`, repeats and blanks taken out."""
    read = []
    for path in scores.argmax(-1).T:
        kept = [int(c) for c in torch.unique_consecutive(path)]
        read.append("".join(LETTERS[c - 1] for c in kept if c))
    return read


def edit_distance(first: str, second: str) -> int:
    """Letters inserted, deleted and replaced (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def accuracies(read: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """`[N, 2]`: whether a word is right, and the share of its letters that need no edit."""
    return np.array(
        [(r == t, max(0.0, 1 - edit_distance(r, t) / len(t))) for r, t in zip(read, truth, strict=True)],
        np.float64,
    )


def trained(
    train: tuple[torch.Tensor, Sequence[str]],
    validation: tuple[torch.Tensor, Sequence[str]],
    seed: int,
    epochs: int,
) -> Reader:
    """The reader, of those with each weight decay, whose characters are best on the validation split.

    Args:
        train, validation: columns `[N, C, w]` and words.
    """
    best, accuracy = None, -1.0
    for decay in WEIGHT_DECAYS:
        torch.manual_seed(seed)
        reader = Reader(train[0].shape[1])
        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=decay)
        steps = epochs * -(-len(train[0]) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
        for _ in range(epochs):
            for rows in torch.randperm(len(train[0])).split(BATCH):
                letters, lengths = encoded([train[1][i] for i in rows])
                scores = reader(train[0][rows])
                widths = torch.full((len(rows),), len(scores))
                loss = F.ctc_loss(scores, letters, widths, lengths, zero_infinity=True)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            found = accuracies(spelled(reader(validation[0])), validation[1])[:, 1].mean()
        if found > accuracy:
            best, accuracy = reader, found
    return best


@register
class OcrWords(Benchmark):
    """Four words a picture. Items are pictures, columns word and character accuracy."""

    name, family, metric = "ocr words", "ocr", "mean of word and character accuracy"
    max_seeds = 1

    @classmethod
    def missing(cls, context: Context) -> str | None:
        wanted = sum(len(names) for fonts in (TRAIN_FONTS, TEST_FONTS) for names in fonts.values())
        found = len(font_files(TRAIN_FONTS)) + len(font_files(TEST_FONTS))
        return None if found == wanted else "needs the typefaces of pip install 'visft[demo]'"

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        parts = {"train": "train", "validation": "validation", "test": self.context.split}
        return {name: _pictures(part) for name, part in parts.items()}

    def items(self, tower: FeatureStore, pictures: Mapping[str, Pictures], seed: int) -> np.ndarray:
        parts = {"train": "train", "validation": "validation", "test": self.context.split}
        columns = {name: _columns(tower, pictures[name]) for name in parts}
        mean = columns["train"].mean((0, 2), keepdim=True)
        deviation = columns["train"].std((0, 2), keepdim=True) + 1e-6
        columns = {name: (found - mean) / deviation for name, found in columns.items()}
        truth = {name: [word for rows in lines(part) for word, _ in rows] for name, part in parts.items()}
        with one_thread():
            sides = ((columns[name], truth[name]) for name in ("train", "validation"))
            reader = trained(*sides, seed, EPOCHS)
            with torch.no_grad():
                read = spelled(reader(columns["test"]))
        return accuracies(read, truth["test"]).reshape(-1, LINES, 2).mean(1)


def _pictures(part: str) -> Pictures:
    rows = lines(part)

    def make() -> Iterator[np.ndarray]:
        files = font_files(TRAIN_FONTS) | font_files(TEST_FONTS)
        for number, each in enumerate(rows):
            yield picture(each, files, np.random.default_rng([14, list(COUNTS).index(part), number]))

    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return Pictures(f"words/{part}/{SIDE}/{digest}", len(rows), make, scale=SCALE, dense=True)


def _columns(tower: FeatureStore, pictures: Pictures) -> torch.Tensor:
    """The columns of each line `[count * LINES, rows * C, w]`, whose rows are averaged to two."""
    found = []
    for start in range(0, pictures.count, 64):
        maps = tower.dense(pictures, start, min(start + 64, pictures.count))
        width = max(SIDE // 8, maps.shape[3])  # enough for seven letters, whatever the tower's patch
        maps = F.interpolate(maps, (2 * LINES, width), mode="area")
        found.append(maps.unflatten(2, (LINES, 2)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1))
    return torch.cat(found)
