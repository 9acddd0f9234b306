"""Few-shot classification by logistic regression: emoji that no fine-tuning scene shows, and digits."""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from visft.errors import DataError

from ..features import FeatureStore, Pictures
from ..readout import chosen_on_validation
from ..registry import Benchmark, Context, register
from . import emoji

SHOTS = (1, 2, 4, 8, 16)
CLASSES, VALIDATION, TEST = 100, 4, 4


@register
class FewShotEmoji(Benchmark):
    """Trained on 1 to 16 views of each of 100 emoji, tested on other views. Items are emoji, k the numbers of shots."""

    name, family, metric = "few-shot emoji", "few-shot", "accuracy, mean over 1 to 16 shots"

    def indices(self) -> list[int]:
        """The classes, of `catalogue()`."""
        return emoji.of_split(self.context.split)[:CLASSES]

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        per_class = max(SHOTS) + VALIDATION
        return {
            "train": emoji.views(self.indices(), per_class, 1000 + seed),
            "test": emoji.views(self.indices(), TEST, 2000 + seed),
        }

    def items(self, tower: FeatureStore, pictures: Mapping[str, Pictures], seed: int) -> np.ndarray:
        classes = len(self.indices())
        train = tower.embeddings(pictures["train"]).view(classes, max(SHOTS) + VALIDATION, -1)
        test = tower.embeddings(pictures["test"]).view(classes, TEST, -1)
        labels = torch.arange(classes)
        validation = (train[:, max(SHOTS) :].flatten(0, 1), labels.repeat_interleave(VALIDATION))
        columns = []
        for shots in SHOTS:
            seen = (train[:, :shots].flatten(0, 1), labels.repeat_interleave(shots))
            model = chosen_on_validation(seen, validation, classes)
            right = model.predict(test.flatten(0, 1)).view(classes, TEST) == labels[:, None]
            columns.append(right.float().mean(1))
        return torch.stack(columns, 1).numpy()


@register
class FewShotVendor(FewShotEmoji):
    """Tested on another vendor's drawings."""

    name, metric = "few-shot vendor", "accuracy on another vendor, mean over 1 to 16 shots"

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return None if context.pictures else "needs --pictures"

    def indices(self) -> list[int]:
        drawn = emoji.drawn_by(self.context.pictures)
        return [i for i in emoji.of_split(self.context.split) if i in drawn][:CLASSES]

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        test = emoji.views(self.indices(), TEST, 2000 + seed, folder=self.context.pictures)
        return {**super().pictures(seed), "test": test}


@register
class FewShotDigits(Benchmark):
    """scikit-learn's handwritten digits: a foreign domain. Items are pictures; each seed draws other shots."""

    name, family, metric = "few-shot digits", "few-shot", "accuracy on digits, mean over 1 to 16 shots"

    def _halves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the pictures to train on and to test on, all pictures `[N, 8, 8]`, all labels."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("few-shot digits needs scikit-learn: pip install 'visft[eval]'") from error
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        halves = (first, second) if self.context.split == "test" else (second, first)
        return *halves, digits.images, digits.target

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        train, test, images, _ = self._halves()
        digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]

        def make(indices: np.ndarray) -> Iterator[np.ndarray]:
            for i in indices:
                grey = np.clip(images[i] * 255 / 16, 0, 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
                yield np.repeat(grey[:, :, None], 3, axis=2)

        return {
            name: Pictures(
                f"digits/{digest}/{self.context.split}/{name}", len(half), lambda half=half: make(half)
            )
            for name, half in (("train", train), ("test", test))
        }

    def items(self, tower: FeatureStore, pictures: Mapping[str, Pictures], seed: int) -> np.ndarray:
        train, test, _, target = self._halves()
        labels, wanted = torch.from_numpy(target[train]), torch.from_numpy(target[test])
        features, tested = tower.embeddings(pictures["train"]), tower.embeddings(pictures["test"])
        order = np.random.default_rng(seed).permutation(len(train))
        by_class = [[i for i in order if labels[i] == digit] for digit in range(10)]
        held = torch.tensor([i for rows in by_class for i in rows[max(SHOTS) : max(SHOTS) + 20]])
        columns = []
        for shots in SHOTS:
            rows = torch.tensor([i for rows in by_class for i in rows[:shots]])
            model = chosen_on_validation((features[rows], labels[rows]), (features[held], labels[held]), 10)
            columns.append(model.predict(tested) == wanted)
        return torch.stack(columns, 1).numpy()
