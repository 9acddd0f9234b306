"""Zero-shot classification under the demo suite's 20 corruptions, on every set of `zero_shot`."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from towerbench.demo import robustness
from towerbench.features import FeatureStore, Images, fitted
from towerbench.real import sources, zero_shot
from towerbench.registry import Context, variant

COUNT = 500
"""Number of images of a set. Each is shown under every corruption. They are spread over the set and always the same."""

SIDE = 224
"""Images are corrupted at this size, as in ImageNet-C (arXiv:1903.12261), so that strengths mean the same on any set.
"""


class _Robustness(sources.RealBenchmark):
    """Items are images, k the corruptions."""

    family, metric = "robustness", "top-1 accuracy, mean over 20 corruptions"
    tested: type[zero_shot.ZeroShot]

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        whole = self.tested(context).set
        self.set = whole.part(sources.spread(len(whole.labels), COUNT))

    def images(self, seed: int) -> Mapping[str, Images]:
        border, kinds = self.set.border, sum(map(len, robustness.CORRUPTIONS.values()))

        def corrupted(image: np.ndarray, number: int) -> Iterator[np.ndarray]:
            [image] = zero_shot.without_border(image, border)
            image = fitted(image, SIDE, SIDE, "crop")
            yield from robustness.corrupted(image, np.random.default_rng([seed, number]))

        what = ",".join(f"{f.__name__}{strengths}" for f, strengths in robustness.CORRUPTIONS.items())
        name = f"{self.name} at {SIDE}, {border} pixels of border, {what}"
        return {"test": sources.images(self.set.sources, name, change=corrupted, times=kinds)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        found = (tower.embeddings(images["test"]) @ self.set.classifier(tower).T).argmax(1)
        return (found.view(len(self.set.labels), -1) == torch.tensor(self.set.labels)[:, None]).numpy()


for _name, _tested in zero_shot.BY_NAME.items():
    variant(_Robustness, f"robustness {_name}", f"Corrupted {_name}.", tested=_tested, needs=_tested.needs)
