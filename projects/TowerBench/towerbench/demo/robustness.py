"""Zero-shot classification under corruption, after Hendrycks and Dietterich (arXiv:1903.12261)."""

import io
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image, ImageFilter

from towerbench.demo import emoji
from towerbench.demo.zero_shot import hits
from towerbench.features import FeatureStore, Images
from towerbench.registry import Benchmark, register

COUNT = 150
"""Number of emoji. Each is shown under every corruption."""


def blur(image: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Blur by a Gaussian. The radius is in hundredths of the side."""
    pixels = radius * image.shape[0] / 100
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(pixels)))


def noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise. The standard deviation is a share of the range."""
    noisy = image + 255 * deviation * rng.standard_normal(image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Add JPEG artefacts. The quality is from 1 to 95."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(quality))
    return np.asarray(Image.open(buffer))


def contrast(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Reduce the contrast about the mean colour."""
    mean = image.mean((0, 1), keepdims=True)
    return np.clip(np.round((image - mean) * factor + mean), 0, 255).astype(np.uint8)


CORRUPTIONS: dict[Callable, tuple[float, ...]] = {
    blur: (0.8, 1.4, 2.0, 3.0, 4.5),
    noise: (0.04, 0.08, 0.12, 0.18, 0.26),
    jpeg: (30, 20, 14, 9, 5),
    contrast: (0.5, 0.4, 0.3, 0.2, 0.1),
}
"""Corruptions and the five strengths of each."""


def corrupted(image: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield an image `[H, W, 3]` uint8 under every corruption, 20 in all."""
    for corrupt, strengths in CORRUPTIONS.items():
        for strength in strengths:
            yield corrupt(image, strength, rng)


@register
class RobustnessEmoji(Benchmark):
    """One view of each of 150 emoji under 4 corruptions with 5 strengths. Items are emoji, k the corruptions."""

    name, family, metric = "robustness emoji", "robustness", "top-1 accuracy, mean over 20 corruptions"
    readout_seconds = 0.1
    max_seeds = 1

    def indices(self) -> list[int]:
        """Return the indices into `catalogue()` of the emoji that are shown."""
        return emoji.of_split(self.context.split)[:COUNT]

    def images(self, seed: int) -> Mapping[str, Images]:
        clean = emoji.views(self.indices(), 1, 3000 + seed)

        def make() -> Iterator[np.ndarray]:
            for number, image in enumerate(clean.make()):
                yield from corrupted(image, np.random.default_rng([seed, number]))

        kinds = ",".join(f"{f.__name__}{strengths}" for f, strengths in CORRUPTIONS.items())
        return {"corrupted": Images(f"{clean.key}/{kinds}", clean.count * 20, make)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        shown = [index for index in self.indices() for _ in range(20)]
        return hits(tower, tower.embeddings(images["corrupted"]), shown).reshape(-1, 20)
