"""MMVP-VLM: pairs of images that CLIP considers alike, and statements about them (arXiv:2401.06209)."""

import csv
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.real import sources
from towerbench.real.sources import Source
from towerbench.registry import variant

logger = logging.getLogger(__name__)

PAIRS = 135
"""Number of pairs: 15 of each of nine visual patterns. One pair is 0.74 points."""

TEMPLATE = "a photo of {}"
"""The authors' script puts these words before each statement."""


@dataclass(frozen=True)
class Pair:
    """Two images, and for each a statement that is not true of the other."""

    files: tuple[Path, Path]
    statements: tuple[str, str]


@functools.lru_cache(maxsize=1)
def pairs(folder: Path) -> tuple[Pair, ...]:
    """Return the pairs of Questions.csv. Two lines with an odd number and the next number are a pair.

    Raises:
        DataError: a line is broken, or the other line of its pair is missing.
    """
    file = folder / "Questions.csv"
    with sources.readable(file, "CSV file"), open(file, encoding="utf-8-sig", newline="") as handle:
        header, *lines = [row for row in csv.reader(handle) if row] or [[]]
    if len(header) != 3 or header[0].strip().isdigit():
        raise DataError(
            f"{file}: its first line is {header}; the names of three columns (number, type, statement) were expected; "
            "get it again"
        )
    rows = []
    for row in lines:
        if len(row) != 3 or not row[0].strip().isdigit() or not row[2].strip():
            raise DataError(
                f"{file}: a line is {row}; a number, a type and a statement were expected; mend it"
            )
        rows.append((int(row[0]), row[1].strip(), row[2].strip()))
    found = []
    for place in range(0, len(rows), 2):
        first, *other = rows[place : place + 2]
        if first[0] % 2 == 0 or not other or other[0][0] != first[0] + 1:
            raise DataError(
                f"{file}: question {first[0]} ({first[1]}) is followed by {other[0][:2] if other else 'nothing'}; "
                "pairs of an odd number and the next were expected; get it again"
            )
        files = [
            folder / "MLLM_VLM Images" / first[1] / f"{number}.jpg" for number in (first[0], other[0][0])
        ]
        found.append(Pair((files[0], files[1]), (first[2], other[0][2])))
    if not found:
        raise DataError(f"{file}: has no question; get it again")
    if len(found) != PAIRS:
        logger.warning(
            "%s: has %d pairs, and MMVP-VLM %d: its figures are not those of others", file, len(found), PAIRS
        )
    return tuple(found)


class Mmvp(sources.RealBenchmark):
    """Items are pairs. The score is whether both choices are right. An equally near alternative counts as wrong."""

    family = "vqa"
    item_set = "mmvp-vlm"
    choice: int
    """Whether the choice is between images (1) or statements (2)."""
    needs = {
        "MMVP_VLM/Questions.csv": "MMVP-VLM's statements",
        "MMVP_VLM/MLLM_VLM Images": "its 270 images, in a folder for each of nine patterns",
    }

    @functools.cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs, which are read once."""
        return pairs(self.path("MMVP_VLM/Questions.csv").parent)

    def images(self, seed: int) -> Mapping[str, Images]:
        files = [Source(file) for pair in self.pairs for file in pair.files]
        questions = [self.path("MMVP_VLM/Questions.csv")]
        return {"test": sources.images(files, "mmvp-vlm", annotations=questions)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        seen = tower.embeddings(images["test"]).unflatten(0, (-1, 2))
        said = tower.text([TEMPLATE.format(text) for pair in self.pairs for text in pair.statements])
        similar = seen @ said.unflatten(0, (-1, 2)).transpose(1, 2)  # [pairs, images, statements]
        own, other = (each.diagonal(dim1=1, dim2=2) for each in (similar, similar.flip(self.choice)))
        return (own > other).all(1).numpy()

    def baselines(self) -> dict[str, float]:
        return {"chance": 0.25}


variant(
    Mmvp,
    "vqa mmvp-vlm",
    "As the authors' script counts, and published figures are: each statement chooses one of the two images.",
    metric="pairs whose statements both choose their image",
    choice=1,
)
variant(
    Mmvp,
    "vqa mmvp-vlm pictures",
    "The other way: each image chooses one of the two statements.",
    metric="pairs whose images both choose their statement",
    choice=2,
)
