"""Images of words, read by a CTC readout on the feature map: IIIT5K, SVT, IC13, IC15, SVTP, CUTE80."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from towerbench import ctc_readout
from towerbench.ctc_readout import LINES
from towerbench.demo import ocr as rendered
from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.real import sources, words
from towerbench.real.words import WordSet
from towerbench.registry import Context, variant
from towerbench.standardise import standardised

TRAINING = ("ocr/train/real", "ocr/train/synth", "ocr/train", "data_lmdb_release/training")
"""Folders where LMDBs to train the readout on may be, at any depth. The first that exists is used."""

COUNTS = {"train": 12000, "held": 1500}
"""Number of words to train on, and to choose by. They are equally many of each LMDB, spread over it, or rendered words.
"""

EPOCHS = 20
LEAST = 32
"""Columns of a line. Each stands for two letters or blanks, so they are enough for words of 25 letters."""

SIZES = (20, 48)
"""Height of rendered words in pixels."""


class Ocr(sources.RealBenchmark):
    """Items are images of `LINES` words. Columns are correct words, shares of correct characters, and the number of
    words."""

    family = "ocr"
    version = 2

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        folder = training(context.data)
        how = f"words of {folder.relative_to(context.data)}" if folder else "rendered words"
        self.metric = f"mean of word and character accuracy, readout trained on {how}"

    @classmethod
    def missing(cls, context: Context) -> str | None:
        reason = super().missing(context)
        if reason:
            return reason
        [tested] = cls.needs
        folder = next(context.data / path for path in tested.split("|") if (context.data / path).exists())
        train = training(context.data)
        for each in (folder, *(databases(train)[:1] if train else ())):
            if words.needs_package(each):
                return words.needs_package(each)
        if not train:
            return rendered.OcrWords.missing(context)
        return None

    @functools.cached_property
    def set(self) -> WordSet:
        """The words that are read."""
        return words.word_set(self.name.removeprefix("ocr "), self.path(next(iter(self.needs))))

    @functools.cached_property
    def readout(self) -> Mapping[str, WordSet]:
        """The words to train on (`train`) and to choose by (`held`)."""
        return readout_sets(training(self.context.data), tuple(COUNTS.items()))

    def images(self, seed: int) -> Mapping[str, Images]:
        return {name: each.images() for name, each in ({**self.readout, "test": self.set}).items()}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        # The test sets share this key.
        key = "ocr", images["train"].identity, images["held"].identity, EPOCHS, seed
        labels = {name: each.labels for name, each in self.readout.items()}
        read = tower.once(key, lambda: trained(tower, images, labels, seed))
        found = read((images["test"], len(self.set.labels)))
        return tallied(ctc_readout.accuracies(found, self.set.labels))

    def figure(self, means: np.ndarray) -> np.ndarray:
        return means[..., :2].mean(-1) / means[..., 2]


def trained(
    tower: FeatureStore, images: Mapping[str, Images], labels: Mapping[str, Sequence[str]], seed: int
) -> Callable[[tuple[Images, int]], list[str]]:
    """Train a reader on one tower's features. Return a function from images and a number to their first words.

    Args:
        images: `train` and `held`.
        labels: the words in these images, `LINES` per image. The last image may have fewer.
    """

    def columns(words_of: tuple[Images, int]) -> Iterator[torch.Tensor]:
        """Yield columns `[n, C, w]` of the first words, in chunks."""
        shown, count = words_of
        for part in ctc_readout.columns(tower, shown, LEAST):
            yield part[:count]
            count -= len(part)

    words_of = {name: (images[name], len(texts)) for name, texts in labels.items()}
    seen = standardised(columns, words_of["train"], channels=1)
    # Columns are kept in half precision, because there are thousands of words.
    sides = ((torch.cat([part.half() for part in seen(words_of[name])]), labels[name]) for name in labels)
    reader = ctc_readout.trained(*sides, words.LETTERS, seed, EPOCHS)
    return lambda of: [word for part in seen(of) for word in reader.read(part)]


def tallied(scores: np.ndarray) -> np.ndarray:
    """Return sums of the words' scores `[N, k]` by image, and the number of words per image: `[ceil(N / LINES), k +
    1]`."""
    scores = np.concatenate((scores, np.ones((len(scores), 1))), 1)
    empty = np.zeros((-len(scores) % LINES, scores.shape[1]))
    return np.concatenate((scores, empty)).reshape(-1, LINES, scores.shape[1]).sum(1)


# ---------------------------------------------------------------- training data of the readout


def training(data: Path) -> Path | None:
    """Return the folder below `data` with LMDBs to train on. None: there is none."""
    return next((data / path for path in TRAINING if databases(data / path)), None)


def databases(folder: Path) -> list[Path]:
    """Return the LMDBs in a folder, at any depth."""
    return sorted(file.parent for file in folder.rglob("data.mdb"))


@functools.lru_cache(maxsize=1)
def readout_sets(folder: Path | None, counts: tuple[tuple[str, int], ...]) -> dict[str, WordSet]:
    """Return `train` and `held`: words of the LMDBs in a folder, or rendered words.

    Raises:
        DataError: an LMDB is broken.
    """
    if folder is None:
        return {name: rendered_words(name, count) for name, count in counts}
    every = databases(folder)
    wanted = sum(count for _, count in counts)
    parts = [words.database(each, most) for each, most in shares(every, wanted).items()]
    known = [
        (part, i)
        for part in parts
        for i, text in enumerate(part.texts)
        if 0 < len(words.letters(text)) <= words.LONGEST
    ]
    order = np.random.default_rng(0).permutation(len(known))
    held = max(1, len(known) * dict(counts)["held"] // wanted)
    files = [file for part in parts for file in part.files]

    def of(name: str, numbers: np.ndarray) -> WordSet:
        # The order within an LMDB is random, so that the readout does not learn which words are neighbours there.
        chosen = sorted((known[i] for i in numbers), key=lambda entry: parts.index(entry[0]))
        labels = [words.letters(part.texts[i]) for part, i in chosen]

        def read() -> Iterator[np.ndarray]:
            for part in parts:
                yield from part.read([i for other, i in chosen if other is part])

        return WordSet(f"words/to read by, {name}", labels, read, files)

    if len(known) <= held:
        raise DataError(
            f"{folder}: its LMDBs have {len(known)} words with letters or digits; more are needed to train a readout"
        )
    return {"train": of("train", order[held:]), "held": of("held", order[:held])}


def shares(folders: list[Path], wanted: int) -> dict[Path, int]:
    """Return the number of words of each LMDB. They are equal, but if one LMDB has fewer, the others give more."""
    sizes = {folder: words.size(folder) for folder in folders}
    found: dict[Path, int] = {}
    for folder in sorted(folders, key=lambda each: (sizes[each], each)):
        left = len(folders) - len(found)
        found[folder] = min(sizes[folder], -(-(wanted - sum(found.values())) // left))
    return {folder: found[folder] for folder in folders}


def rendered_words(part: str, count: int) -> WordSet:
    """Return words and random letters in the demo suite's typefaces: those of its training to train on, those of its
    test to choose by."""
    rng = np.random.default_rng([16, list(COUNTS).index(part)])
    fonts = rendered.TRAIN_FONTS if part == "train" else rendered.TEST_FONTS
    faces = [f"{package}/{name}" for package, names in fonts.items() for name in names]
    vocabulary = rendered.words()["train" if part == "train" else "validation"]
    shown = []
    for number in range(count):
        word = str(rng.choice(vocabulary))
        if number % 2:
            word = "".join(rng.choice(list(words.LETTERS), rng.integers(1, 13)))
        cased = (word, word.upper(), word.capitalize())[rng.integers(3)]
        shown.append((cased, str(rng.choice(faces))))

    def read() -> Iterator[np.ndarray]:
        files = rendered.font_files(fonts)
        for number, (word, face) in enumerate(shown):
            draw = np.random.default_rng([17, list(COUNTS).index(part), number])
            yield word_image(word, files[face], draw)

    labels = [word.lower() for word, _ in shown]
    return WordSet(f"words/rendered, {part}, {faces}", labels, read)


def word_image(word: str, file: Path, rng: np.random.Generator) -> np.ndarray:
    """Render a word in a typeface `[H, W, 3]` uint8, cropped tightly: any two different colours, slightly turned, with
    noise."""
    tile = rendered.inked(word, file)
    height = int(rng.integers(*SIZES))
    width = max(4, round(tile.width * height / tile.height * rng.uniform(0.8, 1.2)))
    tile = tile.resize((width, height), Image.Resampling.LANCZOS)
    margin = int(rng.integers(2, 7))
    ink = Image.new("L", (width + 2 * margin, height + 2 * margin), 0)
    ink.paste(tile, (margin, margin))
    ink = ink.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC)
    colours = rng.integers(0, 256, (2, 3))
    while abs(colours.mean(1) @ (1, -1)) < 60:
        colours = rng.integers(0, 256, (2, 3))
    share = np.asarray(ink, np.float32)[..., None] / 255
    pixels = colours[0] * (1 - share) + colours[1] * share + rng.normal(0, 6, (*share.shape[:2], 1))
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


# For each set: its folders in the layouts of PARSeq, deep-text-recognition-benchmark and MMOCR, and its number of
# words.
_SETS = {
    "iiit5k": ("ocr/test/IIIT5k", "data_lmdb_release/evaluation/IIIT5k_3000", "mixture/III5K", "3,000"),
    "svt": ("ocr/test/SVT", "data_lmdb_release/evaluation/SVT", "mixture/svt", "647"),
    "ic13": (
        "ocr/test/IC13_1015",
        "ocr/test/IC13_857",
        "data_lmdb_release/evaluation/IC13_1015",
        "data_lmdb_release/evaluation/IC13_857",
        "mixture/icdar_2013",
        "1,015 or 857",
    ),
    "ic15": (
        "ocr/test/IC15_2077",
        "ocr/test/IC15_1811",
        "data_lmdb_release/evaluation/IC15_2077",
        "data_lmdb_release/evaluation/IC15_1811",
        "mixture/icdar_2015",
        "2,077 or 1,811",
    ),
    "svtp": ("ocr/test/SVTP", "data_lmdb_release/evaluation/SVTP", "mixture/svtp", "645"),
    "cute80": ("ocr/test/CUTE80", "data_lmdb_release/evaluation/CUTE80", "mixture/ct80", "288"),
}

for _name, (*_paths, _count) in _SETS.items():
    variant(
        Ocr,
        f"ocr {_name}",
        f"{_name}, letters and digits, case not told apart.",
        metric="mean of word and character accuracy",
        needs={"|".join(_paths): f"{_count} word images, an LMDB or a folder with a list of labels"},
    )
