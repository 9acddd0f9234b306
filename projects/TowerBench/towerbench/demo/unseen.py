"""Scenes of things that no fine-tuning scene shows, with masks and captions: what several demo benchmarks share."""

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from demoworld import scenes as demo_scenes
from demoworld.unseen_things import cast, scene
from towerbench.features import Images

COUNTS = {"train": 700, "validation": 200, "test": 500, "development": 500}
"""Scenes of each part; `train` and `validation` are for readouts."""

ITEMS = "unseen scenes"
"""`item_set` of the benchmarks whose items are all scenes of the split."""

DENSE_SCALE = 2.0
"""Maps are of scenes at twice the tower's native side: at the native one an object is few patches wide. Embeddings are
of the native side, as CLIP's are."""


def categories() -> tuple[str, ...]:
    """Names of the categories; a scene's objects index them."""
    return cast().names


@functools.lru_cache(maxsize=4)
def scenes(part: str) -> tuple[demo_scenes.Scene, ...]:
    """All scenes of a part (see `COUNTS`), the same at every call."""
    number = list(COUNTS).index(part)
    return tuple(scene(number, i) for i in range(COUNTS[part]))


def images(part: str, *, dense: bool = False) -> Images:
    """A part's images, in the order of `scenes(part)`: squashed, so that masks and boxes scale alone.

    Args:
        dense: for maps (and embeddings) at `DENSE_SCALE`, else for embeddings at the native side.
    """

    def make() -> Iterator[np.ndarray]:
        yield from (scene.image for scene in scenes(part))

    scale = DENSE_SCALE if dense else 1.0
    return Images(f"unseen scenes/{part}/{COUNTS[part]}", COUNTS[part], make, scale=scale, dense=dense)


def parts(split: str) -> dict[str, str]:
    """What a readout asks for by the part that it is: `train`, `validation`, and the split as `test`."""
    return {"train": "train", "validation": "validation", "test": split}


def readout_images(split: str) -> Mapping[str, Images]:
    """What a readout on maps asks for."""
    return {name: images(part, dense=True) for name, part in parts(split).items()}
