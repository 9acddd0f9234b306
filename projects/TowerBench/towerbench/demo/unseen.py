"""Scenes of things that no fine-tuning scene contains, with masks and captions. Several demo benchmarks share them."""

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from demoworld import scenes as demo_scenes
from demoworld.unseen_things import cast, scene
from towerbench.features import Images

COUNTS = {"train": 700, "validation": 200, "test": 500, "development": 500}
"""Number of scenes of each part. `train` and `validation` are for readouts."""

ITEMS = "unseen scenes"
"""The `item_set` of the benchmarks whose items are all scenes of the split."""

DENSE_SCALE = 2.0
"""Maps are of scenes at twice the tower's native side, because an object is only a few patches wide at the native side.
Embeddings are of the native side, like CLIP's."""


def categories() -> tuple[str, ...]:
    """Return the names of the categories. Objects of scenes have indices into them."""
    return cast().names


@functools.lru_cache(maxsize=4)
def scenes(part: str) -> tuple[demo_scenes.Scene, ...]:
    """Return all scenes of a part (see `COUNTS`). They are the same at every call."""
    number = list(COUNTS).index(part)
    return tuple(scene(number, i) for i in range(COUNTS[part]))


def images(part: str, *, dense: bool = False) -> Images:
    """Return the images of a part, in the order of `scenes(part)`. They are squashed, so that masks and boxes only
    scale.

    Args:
        dense: for maps (and embeddings) at `DENSE_SCALE`. Otherwise for embeddings at the native side.
    """

    def make() -> Iterator[np.ndarray]:
        yield from (scene.image for scene in scenes(part))

    scale = DENSE_SCALE if dense else 1.0
    return Images(f"unseen scenes/{part}/{COUNTS[part]}", COUNTS[part], make, scale=scale, dense=dense)


def parts(split: str) -> dict[str, str]:
    """Return the parts that a readout needs, by their role: `train`, `validation`, and the split as `test`."""
    return {"train": "train", "validation": "validation", "test": split}


def readout_images(split: str) -> Mapping[str, Images]:
    """Return the image sets that a readout on maps needs."""
    return {name: images(part, dense=True) for name, part in parts(split).items()}
