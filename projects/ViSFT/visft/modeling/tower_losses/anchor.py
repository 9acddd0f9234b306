"""An anchor: the tuned tower's embedding of an image stays near that of the tower before tuning."""

import torch
from detectron2.config import CfgNode
from torch import Tensor

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT
from visft.modeling.tower_losses.base import Objective, check_size, cosine_distance
from visft.modeling.tower_losses.batch import Batch, crop
from visft.modeling.tower_losses.build import VISFT_OBJECTIVES_REGISTRY

LUMA = (0.299, 0.587, 0.114)
"""Of R, G and B, by ITU-R BT.601."""

SMALLEST = 0.2
"""The least share of an image's sides that a part of it has."""


@VISFT_OBJECTIVES_REGISTRY.register()
class Anchor(Objective):
    """1 - cosine of the two CLIP embeddings of an image, whole and, with CROPS, in parts: the mean over all of them,
    with or without labels.

    Parts show single things, large. They are another kind of image than the training's, whose embedding is held, too.
    With RECOLOR a random half of the parts becomes grey, with more or less contrast, and half of these negatives.
    """

    needs_original = True
    reads_masks = False

    def __init__(self, cfg: CfgNode, name: str, backbone: CLIPViT) -> None:
        super().__init__(cfg, name, backbone)
        node = cfg.MODEL.VISFT[name.upper()]
        self.size, self.crops, self.recolor = node.SIZE, node.CROPS, node.RECOLOR

    @classmethod
    def check(cls, cfg: CfgNode, name: str) -> None:
        super().check(cfg, name)
        key, node = f"MODEL.VISFT.{name.upper()}", cfg.MODEL.VISFT[name.upper()]
        check_size(cfg, f"{key}.SIZE", node.SIZE)
        if node.RECOLOR and not node.CROPS:
            raise ConfigError(
                f"{key}.RECOLOR is set, and {key}.CROPS is 0: it is parts that are recoloured; set CROPS, too"
            )
        if node.CROPS < 0:
            raise ConfigError(
                f"{key}.CROPS is {node.CROPS}; expected 0 (none) or a number of parts of an image"
            )

    def has_labels(self, image: dict) -> bool:
        return True

    def count(self, batch: Batch, rows: list[int]) -> int:
        return len(rows) * (1 + self.crops)

    def loss(self, batch: Batch, rows: list[int], normalizer: Tensor) -> Tensor:
        original = batch.original_embeddings(rows, self.size)
        total = cosine_distance(batch.embeddings(rows, self.size), original).sum()
        if self.crops:
            parts = batch.prepared([part for row in rows for part in self.parts(batch, row)], self.size)
            found, expected = (tower.image_embedding(parts) for tower in (batch.backbone, batch.original))
            total = total + cosine_distance(found, expected).sum()
        return total / normalizer

    def parts(self, batch: Batch, row: int) -> list[Tensor]:
        """CROPS parts of an image, of its shape, with sides of SMALLEST to 1 of its own, anywhere in it."""
        image = batch.images[row]["image"]
        height, width = image.shape[1:]
        found = []
        draws = torch.rand(self.crops, 3, generator=batch.generator(row, "anchor")).tolist()
        # From a generator of their own: with and without RECOLOR the parts are of the same places.
        colours = torch.rand(self.crops, 3, generator=batch.generator(row, "anchor colours")).tolist()
        for (share, x, y), colour in zip(draws, colours, strict=True):
            share = SMALLEST + (1 - SMALLEST) * share
            x, y = x * (1 - share), y * (1 - share)
            part = crop(image, [x * width, y * height, (x + share) * width, (y + share) * height])
            found.append(recolored(part, *colour) if self.recolor else part)
        return found


def recolored(image: Tensor, whether: float, inverted: float, contrast: float) -> Tensor:
    """An image `[3, H, W]`, 0..255, as it is or grey, by three numbers in 0..1.

    Args:
        whether: from 0.5 on it becomes grey (luma of BT.601).
        inverted: from 0.5 on a grey one becomes its negative.
        contrast: grey values are spread about their mean by 0.5 (at 0) to 2 (at 1).
    """
    if whether < 0.5:
        return image
    grey = (image.float() * image.new_tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(0)
    if inverted >= 0.5:
        grey = 255 - grey
    mean = grey.mean()
    return (mean + (grey - mean) * 4 ** (contrast - 0.5)).clamp(0, 255).expand(3, -1, -1)
