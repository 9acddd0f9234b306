"""What each patch shows of its place: segmentation by a linear probe and by names, and correspondence."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from towerbench.demo import emoji, regions, unseen
from towerbench.dense_maps import in_chunks
from towerbench.features import FeatureStore, Images, fitted
from towerbench.readout import Readout, chosen_on_validation
from towerbench.registry import Benchmark, register
from towerbench.segmentation import mean_iou, sampled, segmented, training_cells

L2 = (1e-2, 1e-3, 1e-4)
ON_OBJECTS, ON_BACKGROUND = 6, 3
"""Number of cells of a scene that the probe trains on."""

SIDE = 64
"""Segmentations are compared at SIDE x SIDE pixels."""

WARPED, WARPED_SIDE = 200, 128
NEAR = 0.1
"""A match counts if it is within this share of the image's side (PCK@0.1)."""


def labels_at(scene, side: int) -> torch.Tensor:
    """Return the category of each pixel `[side, side]` of a squashed scene. The background has the number of
    categories."""
    height, width = scene.image.shape[:2]
    labels = np.full((height, width), len(unseen.categories()))
    for item in scene.objects:
        labels[item.mask] = item.category
    return sampled(labels, side, side)


class _Segmentation(Benchmark):
    """Items are scenes. Columns are intersections and unions by class."""

    family = "dense"
    max_seeds = 1
    """Only the places to train at are random, and they are the same for every seed."""
    item_set = unseen.ITEMS

    def readout(self, tower: FeatureStore, images: Mapping[str, Images]) -> tuple[Readout, int]:
        """Return a function from cells `[N, h, w, C]` to class scores `[N, h, w, classes]`, and how many classes there
        are."""
        raise NotImplementedError

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        scenes = unseen.scenes(self.context.split)
        scores, classes = self.readout(tower, images)
        return segmented(
            tower, images["test"], scores, lambda number: (labels_at(scenes[number], SIDE), 1), classes
        )

    def figure(self, means: np.ndarray) -> np.ndarray:
        return mean_iou(means)


@register
class DenseProbe(_Segmentation):
    """A logistic regression on each cell, for all categories and the background."""

    name, metric = "dense probe", "mIoU of a linear probe"
    readout_seconds = 9
    version = 2

    def images(self, seed: int) -> Mapping[str, Images]:
        return unseen.readout_images(self.context.split)

    def readout(self, tower: FeatureStore, images: Mapping[str, Images]) -> tuple[Readout, int]:
        classes = len(unseen.categories()) + 1
        train, validation = (_cells(tower, images[part], part) for part in ("train", "validation"))
        return chosen_on_validation(train, validation, classes, L2).logits, classes


@register
class DenseText(_Segmentation):
    """Each cell is projected into the space of texts and compared with the names of all categories. Only cells on
    objects count, because the background has no name."""

    name, metric = "dense text", "mIoU of patches against names, on objects"
    readout_seconds = 2.5

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": unseen.images(self.context.split, dense=True)}

    def readout(self, tower: FeatureStore, images: Mapping[str, Images]) -> tuple[Readout, int]:
        names = tower.class_embeddings(unseen.categories(), emoji.TEMPLATES)
        return lambda cells: tower.project(cells) @ names.T, len(names)


@register
class DenseCorrespondence(Benchmark):
    """Cells on objects are found again in a turned, scaled, shifted and recoloured image, by their nearest feature.

    Items are scenes. Columns are the number of cells that were found and their number in all.
    """

    name, family, metric = "dense correspondence", "dense", "PCK@0.1 under augmentation"
    max_seeds = 1

    def images(self, seed: int) -> Mapping[str, Images]:
        scenes = unseen.images(self.context.split, dense=True)
        count = min(WARPED, scenes.count)

        def make() -> Iterator[np.ndarray]:
            for number, scene in enumerate(unseen.scenes(self.context.split)[:count]):
                yield warped(scene.image, number)[0]

        key = f"{scenes.key}/warped {count} {WARPED_SIDE}"
        return {"scenes": scenes, "warped": Images(key, count, make, scale=scenes.scale, dense=True)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        count = images["warped"].count
        rows = []
        sides = (in_chunks(tower, images[name], stop=count) for name in ("scenes", "warped"))
        for (start, scenes), (_, turned) in zip(*sides, strict=True):
            for number, (before, after) in enumerate(zip(scenes, turned, strict=True), start):
                scene = unseen.scenes(self.context.split)[number]
                rows.append(self._found(scene, warped(scene.image, number)[1], before, after))
        return np.array(rows, np.float64)

    def figure(self, means: np.ndarray) -> np.ndarray:
        return means[..., 0] / means[..., 1]

    @staticmethod
    def _found(scene, matrix: np.ndarray, before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
        """Return the numbers of cells found and of cells sought, given maps `[C, h, w]` before and after."""
        grid = before.shape[1:]
        centres = torch.stack(
            torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij"), -1
        ).flatten(0, 1)
        xy1 = torch.cat((centres.flip(1), torch.ones(len(centres), 1)), 1)
        wanted = (xy1 @ torch.from_numpy(matrix).float().T).flip(1)
        on_object = regions.cell_labels(scene, grid).flatten() < len(unseen.categories())
        sought = on_object & ((wanted > 0) & (wanted < 1)).all(1)
        before, after = (F.normalize(maps.flatten(1), dim=0) for maps in (before, after))
        nearest = centres[(before[:, sought].T @ after).argmax(1)]
        near = (nearest - wanted[sought]).norm(dim=1) < NEAR
        return int(near.sum()), int(sought.sum())


def warped(image: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a scene that is squashed to WARPED_SIDE, turned, scaled, shifted and recoloured. Also return the matrix
    `[2, 3]` that maps places `(x, y)` in 0..1 of the scene to places of the result."""
    rng = np.random.default_rng([11, number])
    angle, scale = math.radians(rng.uniform(-30, 30)), math.exp(rng.uniform(-0.25, 0.25))
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shift = 0.5 + rng.uniform(-0.08, 0.08, 2) - turn @ (0.5, 0.5)
    back = np.linalg.inv(turn)  # PIL asks for the place of each pixel of the result in the source
    turned = Image.fromarray(fitted(image, WARPED_SIDE, WARPED_SIDE))
    coefficients = np.hstack((back, -WARPED_SIDE * (back @ shift)[:, None])).flatten().tolist()
    fill = tuple(int(value) for value in np.asarray(turned).mean((0, 1)))
    size = (WARPED_SIDE, WARPED_SIDE)
    turned = turned.transform(
        size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=fill
    )
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        turned = enhance(turned).enhance(rng.uniform(0.7, 1.3))
    return np.asarray(turned), np.hstack((turn, shift[:, None]))


def _cells(tower: FeatureStore, images: Images, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features `[N, C]` and labels `[N]` of some cells of every scene. All towers get the same cells."""
    scenes, background = unseen.scenes(part), len(unseen.categories())

    def chosen(number: int, label: torch.Tensor) -> np.ndarray:
        rng, places = np.random.default_rng([12, number]), []
        for there, count in ((label < background, ON_OBJECTS), (label == background, ON_BACKGROUND)):
            places.append(rng.permutation(np.flatnonzero(there.numpy()))[:count])
        return np.concatenate(places)

    return training_cells(
        tower, images, lambda number, grid: regions.cell_labels(scenes[number], grid), chosen
    )
