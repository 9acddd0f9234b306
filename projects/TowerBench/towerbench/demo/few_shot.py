"""Few-shot classification by logistic regression, on emoji that no fine-tuning scene contains and on digits."""

import hashlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from towerbench.demo import emoji
from towerbench.features import FeatureStore, Images
from towerbench.readout import chosen_on_validation
from towerbench.registry import Benchmark, Context, register

SHOTS = (1, 2, 4, 8, 16)
CLASSES, VALIDATION, TEST = 64, 4, 4


@register
class FewShotEmoji(Benchmark):
    """A classifier trained on 1 to 16 views of each of 64 emoji, tested on other views. Items are emoji, k the numbers
    of shots."""

    name, family, metric = "few-shot emoji", "few-shot", "accuracy, mean over 1 to 16 shots"
    readout_seconds = 5.5
    version = 2
    quick_seeds = 2
    """Each seed has 1,536 views, which take a fifth of a tower's time in the suite."""
    vendor: Path | None = None
    """The vendor whose drawings are tested. None: the base vendor."""

    def trained(self) -> list[int]:
        """Return the emoji that have views to train on, as indices into `catalogue()`."""
        return emoji.of_split(self.context.split)[:CLASSES]

    def indices(self) -> list[int]:
        """Return the classes: those of these emoji that the vendor has drawn."""
        return [i for i in self.trained() if i in emoji.drawn_by(self.vendor)]

    def images(self, seed: int) -> Mapping[str, Images]:
        return {
            "train": emoji.views(self.trained(), max(SHOTS) + VALIDATION, 1000 + seed),
            "test": emoji.views(self.indices(), TEST, 2000 + seed, folder=self.vendor),
        }

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        classes, labels = len(self.indices()), torch.arange(len(self.indices()))
        rows = [self.trained().index(i) for i in self.indices()]
        train = tower.embeddings(images["train"]).unflatten(0, (-1, max(SHOTS) + VALIDATION))[rows]
        test = tower.embeddings(images["test"])
        validation = (train[:, max(SHOTS) :].flatten(0, 1), labels.repeat_interleave(VALIDATION))
        columns = []
        for shots in SHOTS:
            seen = (train[:, :shots].flatten(0, 1), labels.repeat_interleave(shots))
            model = chosen_on_validation(seen, validation, classes)
            right = model.predict(test).view(classes, TEST) == labels[:, None]
            columns.append(right.float().mean(1))
        return torch.stack(columns, 1).numpy()


@register
class FewShotVendor(FewShotEmoji):
    """A classifier trained on the same views, tested on another vendor's drawings."""

    name, metric = "few-shot vendor", "accuracy on another vendor, mean over 1 to 16 shots"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.vendor = context.images

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return None if context.images else "needs --pictures"


@register
class FewShotDigits(Benchmark):
    """Handwritten digits of scikit-learn: another domain. Items are images. Each seed samples other shots."""

    name, family, metric = "few-shot digits", "few-shot", "accuracy on digits, mean over 1 to 16 shots"
    readout_seconds = 4
    version = 2

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return None if find_spec("sklearn") else "needs scikit-learn: pip install 'visft[eval]'"

    def _halves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the indices of the images to train on and to test on, all images `[N, 8, 8]`, and all labels."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        halves = (first, second) if self.context.split == "test" else (second, first)
        return *halves, digits.images, digits.target

    def images(self, seed: int) -> Mapping[str, Images]:
        train, test, images, _ = self._halves()
        digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]

        def make(indices: np.ndarray) -> Iterator[np.ndarray]:
            for i in indices:
                grey = np.clip(images[i] * 255 / 16, 0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
                yield np.repeat(grey[:, :, None], 3, axis=2)

        return {
            name: Images(
                f"digits/{digest}/{self.context.split}/{name}", len(half), lambda half=half: make(half)
            )
            for name, half in (("train", train), ("test", test))
        }

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        train, test, _, target = self._halves()
        labels, wanted = torch.from_numpy(target[train]), torch.from_numpy(target[test])
        features, tested = tower.embeddings(images["train"]), tower.embeddings(images["test"])
        order = np.random.default_rng(seed).permutation(len(train))
        by_class = [[i for i in order if labels[i] == digit] for digit in range(10)]
        held = torch.tensor([i for rows in by_class for i in rows[max(SHOTS) : max(SHOTS) + 20]])
        columns = []
        for shots in SHOTS:
            rows = torch.tensor([i for rows in by_class for i in rows[:shots]])
            model = chosen_on_validation((features[rows], labels[rows]), (features[held], labels[held]), 10)
            columns.append(model.predict(tested) == wanted)
        return torch.stack(columns, 1).numpy()
