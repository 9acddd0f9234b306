"""The interface of an objective: a loss on the tower itself, without a head."""

import math
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from torch import Tensor

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT, open_clip_models
from visft.modeling.backbone.tower_adapters import adapt
from visft.modeling.tower_losses.batch import Batch


class Objective:
    """A loss on what the tower computes, without a head. It is no module and trains nothing of its own.

    Built as `objective(cfg, name, backbone)`, where MODEL.VISFT.<NAME> holds its keys.
    """

    needs_original: ClassVar[bool] = False
    """Whether it reads `Batch.original`, the tower before tuning."""

    reads_masks: ClassVar[bool] = True
    """Whether it reads `gt_masks`. If nothing in a training does, none are rendered."""

    reads_captions: ClassVar[bool] = False
    """Whether it learns from captions, so that DATASETS.TRAIN must have some."""

    collective: ClassVar[bool] = False
    """Whether `loss` communicates, so that every process has to call it, also without images."""

    def __init__(self, cfg: CfgNode, name: str, backbone: CLIPViT) -> None:
        self.check(cfg, name)
        self.weight = cfg.MODEL.VISFT[name.upper()].WEIGHT

    @classmethod
    def check(cls, cfg: CfgNode, name: str) -> None:
        """Check the keys of MODEL.VISFT.<NAME>, before anything is built.

        Raises:
            ConfigError: the first that is wrong.
        """
        weight = cfg.MODEL.VISFT[name.upper()].WEIGHT
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"MODEL.VISFT.{name.upper()}.WEIGHT is {weight}; expected a number above 0 (to do without the "
                "objective, leave it out of MODEL.VISFT.OBJECTIVES)"
            )

    def has_labels(self, image: dict) -> bool:
        """Whether it can learn from this image."""
        raise NotImplementedError

    def count(self, batch: Batch, rows: list[int]) -> int:
        """How many terms its loss is the sum of; it is divided by their mean over processes."""
        return len(rows)

    def loss(self, batch: Batch, rows: list[int], normalizer: Tensor) -> Tensor:
        """The loss, a scalar, without its weight.

        Args:
            batch: what the tower makes of the images.
            rows: indices of the images that have labels; [] only if `collective`. With `batch.sharded`, a process that
                has none gives its first image, for a loss that does not count.
            normalizer: mean of `count` over processes, above 0.
        """
        raise NotImplementedError


def check_size(cfg: CfgNode, key: str, size: int) -> None:
    """Check a key that gives the side in pixels of the images whose embedding is taken (0: the tower's own).

    Raises:
        ConfigError: it is no multiple of the tower's patch.
    """
    patch = adapt(open_clip_models.meta_tower(cfg.MODEL.CLIP_VIT.NAME)).patch_size if size else 1
    if size < 0 or size % patch:
        raise ConfigError(
            f"{key} is {size}; expected 0 (the tower's own size) or a multiple of its patch, {patch} pixels"
        )


def cosine_distance(found: Tensor, expected: Tensor) -> Tensor:
    """1 - cosine of rows `[N, D]`, `[N]`, float32: half the squared distance on the unit sphere, which is exactly 0 for
    equal rows."""
    unit = torch.nn.functional.normalize
    return 0.5 * (unit(found.float(), dim=-1) - unit(expected.float(), dim=-1)).square().sum(-1)
