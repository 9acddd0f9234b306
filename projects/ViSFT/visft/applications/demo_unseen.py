"""Scenes of things that no training scene shows, as the base tower and the tuned one see them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from towerbench.demo import emoji, unseen
from towerbench.encoder import patch_embeddings
from towerbench.features import fitted
from towerbench.region_pooling import coverage, mean_features
from towerbench.towers import Tower
from visft.visualization import colours, drawing, principal_components, similarity_maps, value_range

SCENES, THINGS = 4, 3
"""The first SCENES scenes of the test part with at least THINGS different things are drawn, whatever the results."""

SIDE = 384
"""Shorter side of a panel in pixels."""

BEFORE_AFTER = ("before", "after")


@dataclass(frozen=True)
class View:
    """One scene as one tower sees it.

    Args:
        names: the name that the text encoder gives to each object.
        masks, similarity, features: panels `[H, W, 3]` uint8.
    """

    names: tuple[str, ...]
    masks: drawing.Panel
    similarity: drawing.Panel
    features: drawing.Panel


@dataclass(frozen=True)
class Scene:
    """One scene before and after tuning.

    Args:
        number: in the test part.
        truth: the objects' names.
        text: the text of `similarity`, the name of the largest object.
        limits: the cosines at the ends of the colour map.
    """

    number: int
    image: drawing.Panel
    truth: tuple[str, ...]
    text: str
    limits: tuple[float, float]
    before: View
    after: View

    def right(self, side: str) -> int:
        """How many objects are named right `before` or `after`."""
        return sum(name == true for name, true in zip(getattr(self, side).names, self.truth, strict=True))


def draw(
    towers: Sequence[Tower], folder: str | os.PathLike, scenes: Sequence[int] | None = None
) -> list[Scene]:
    """Draw scenes, and write each as `folder/scene_<number>.png`.

    Args:
        towers: the base and the tuned one.
        scenes: numbers in the test part; None: see `SCENES`.
    """
    scenes = chosen() if scenes is None else scenes
    names = unseen.categories()
    texts = [class_embeddings(tower, names) for tower in towers]
    maps = [[_map(tower, unseen.scenes("test")[number].image) for number in scenes] for tower in towers]
    components = principal_components([torch.stack(of) for of in maps])
    found = []
    for place, number in enumerate(scenes):
        views = [
            _Projected(tower, of[place], text) for tower, of, text in zip(towers, maps, texts, strict=True)
        ]
        found.append(_scene(number, views, components))
        drawing.save_image(_sheet(found[-1]), Path(folder) / f"scene_{number}.png")
    return found


def chosen() -> list[int]:
    """The numbers of the scenes that are drawn, see `SCENES`."""
    various = (
        n for n, s in enumerate(unseen.scenes("test")) if len({o.category for o in s.objects}) >= THINGS
    )
    return [number for number, _ in zip(various, range(SCENES), strict=False)]


def class_embeddings(tower: Tower, names: Sequence[str]) -> torch.Tensor:
    """Text embeddings `[len(names), D]` in the templates of the demo tower's pretraining, of unit length."""
    lines = [template.format(name) for template in emoji.TEMPLATES for name in names]
    return F.normalize(tower.text(lines).view(len(emoji.TEMPLATES), len(names), -1).mean(0), dim=-1)


def _map(tower: Tower, image: np.ndarray) -> torch.Tensor:
    """Features `[h, w, C]` of a scene, which is resized as in the benchmarks."""
    squashed = fitted(image, *tower.input_size(unseen.DENSE_SCALE))
    _, maps = tower.encode(torch.from_numpy(squashed).permute(2, 0, 1)[None], dense=True)
    return maps[0].permute(1, 2, 0)


@dataclass(frozen=True)
class _Projected:
    """A tower's features `[h, w, C]` of a scene, and its embeddings `[T, D]` of all names."""

    tower: Tower
    features: torch.Tensor
    texts: torch.Tensor

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return patch_embeddings(self.tower.clip.visual, features).cpu()

    def named(self, masks: Sequence[np.ndarray]) -> tuple[str, ...]:
        """The nearest name of each mask's mean feature, as the benchmark `goi zero-shot` finds it."""
        weights = torch.stack([coverage(mask, self.features.shape[:2]) for mask in masks])
        means = mean_features(self.features.permute(2, 0, 1), weights)
        return tuple(unseen.categories()[i] for i in (self.project(means) @ self.texts.T).argmax(1).tolist())


def _scene(number: int, views: Sequence[_Projected], components) -> Scene:
    scene = unseen.scenes("test")[number]
    masks = [item.mask for item in scene.objects]
    truth = tuple(unseen.categories()[item.category] for item in scene.objects)
    category = max(scene.objects, key=lambda item: item.mask.sum()).category
    scale = SIDE / min(scene.image.shape[:2])
    image = drawing.enlarged(scene.image, *(round(length * scale) for length in scene.image.shape[:2]))
    maps = [similarity_maps(view.project(view.features), view.texts[[category]])[0] for view in views]
    limits = value_range(maps)
    seen = []
    for view, cosines in zip(views, maps, strict=True):
        names = view.named(masks)
        right = [name == true for name, true in zip(names, truth, strict=True)]
        seen.append(
            View(
                names,
                drawing.named_masks(image, masks, names, right),
                drawing.similarity_panel(image, cosines, limits),
                drawing.colour_panel(colours(view.features, components), *image.shape[:2]),
            )
        )
    return Scene(number, image, truth, unseen.categories()[category], limits, *seen)


def _sheet(scene: Scene):
    rows = [
        ("objects, named among names never tuned on", "masks"),
        (f"similarity to the text “{scene.text}”", "similarity"),
        ("features: three principal components", "features"),
    ]
    views = (scene.before, scene.after)
    return drawing.sheet(
        [(title, [getattr(view, kind) for view in views]) for title, kind in rows], BEFORE_AFTER
    )
