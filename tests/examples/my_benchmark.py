"""Which quarter of an image holds a bright square: a linear readout of the tower's embedding."""

import numpy as np
import torch

from towerbench import Benchmark, Images, register
from towerbench.readout import chosen_on_validation


@register
class Quarters(Benchmark):
    name, family, metric = "quarters", "few-shot", "accuracy"

    def images(self, seed):
        parts = ("train", "validation", "test")
        return {part: Images(f"quarters/{part}", 40, lambda part=part: squares(part)) for part in parts}

    def items(self, tower, images, seed):
        labels = torch.arange(40) % 4
        train, validation, test = (tower.embeddings(images[part]) for part in images)
        model = chosen_on_validation((train, labels), (validation, labels), classes=4)
        return (model.predict(test) == labels).numpy()


def squares(part):
    rng = np.random.default_rng(len(part))
    for i in range(40):
        image = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        y, x = rng.integers(4, 20, 2) + 32 * np.array(divmod(i % 4, 2))
        image[y : y + 8, x : x + 8] = 255
        yield image
