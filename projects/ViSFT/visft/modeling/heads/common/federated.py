"""Federated loss: of many classes, only some take part in an iteration's class loss (LVIS, arXiv 1908.03195).

Where images are annotated with some classes only, an unannotated object of another class would be learnt as
background. So each iteration uses the classes annotated in its images and others sampled up to a given number, frequent
ones more often (as detectron2's MODEL.ROI_BOX_HEAD.USE_FED_LOSS, after Zhou et al., arXiv 2103.07461). A class left out
acts as if its score were minus infinity: the softmax runs over the classes that take part, a sigmoid has neither loss
nor gradient.
"""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from visft.errors import ConfigError
from visft.modeling.heads.base import num_targets
from visft.modeling.heads.common.label_space import LabelSpace
from visft.utils import shared_random

_LEFT_OUT = -1e4
"""A score whose softmax and sigmoid are 0 in float32, without the infinities that make 0 times infinity."""


@dataclass(frozen=True)
class Federated:
    """Which classes take part."""

    num_classes: int
    """How many, at least: all annotated classes do."""
    weights: Tensor
    """[outputs + 1] sampling weights; 0 for no-object, and for outputs that are no class."""

    def present(self, images: list[dict], labels: LabelSpace) -> Tensor:
        """[outputs + 1]: 1 for each class annotated in the images, else 0."""
        found = torch.zeros(len(self.weights))
        for image in images:
            if num_targets(image):
                found[labels.encode(image["instances"].gt_classes.cpu())] = 1
        return found

    def draw(self, present: Tensor) -> Tensor:
        """[outputs + 1] bool: the classes that take part, and no-object.

        All processes draw the same (see `visft.utils.shared_random`).

        Args:
            present: [outputs + 1], above 0 for classes annotated in the images of any process.
        """
        chosen = present.cpu() > 0
        weights = torch.where(chosen, 0.0, self.weights)
        missing = min(self.num_classes - int(chosen.sum()), int((weights > 0).sum()))
        if missing > 0:
            chosen[torch.multinomial(weights, missing, generator=shared_random.generator())] = True
        chosen[-1] = True
        return chosen

    @staticmethod
    def leave_out(logits: Tensor, chosen: Tensor) -> Tensor:
        """Logits [..., outputs + 1] in which only the chosen classes count."""
        return logits.masked_fill(~chosen.to(logits.device), _LEFT_OUT)


def build_federated(cfg: CfgNode, name: str, labels: LabelSpace) -> Federated | None:
    """The federated loss of the head `name` by its FED_LOSS_CLASSES and FED_LOSS_POWER; None: all classes take part.

    Raises:
        ConfigError: no frequencies are known of the classes of DATASETS.TRAIN, or not of each.
    """
    node = cfg.MODEL.VISFT[name.upper()]
    if not node.FED_LOSS_CLASSES:
        return None
    known = labels.dataset_ids or range(labels.num_classes)
    counts = class_image_counts(cfg, name)
    if len(counts) != len(known):
        raise ConfigError(
            f"MODEL.VISFT.{name.upper()} has {len(known)} classes, {cfg.DATASETS.TRAIN[0]} says of {len(counts)} how "
            "frequent they are, and the federated loss needs all: set NUM_CLASSES to 0, or FED_LOSS_CLASSES to 0"
        )
    weights = torch.zeros(labels.num_classes + 1)
    weights[torch.as_tensor(known)] = torch.tensor(counts).float() ** node.FED_LOSS_POWER
    return Federated(node.FED_LOSS_CLASSES, weights)


def class_image_counts(cfg: CfgNode, name: str) -> list[int]:
    """In how many images each contiguous class of DATASETS.TRAIN is, from the metadata `class_image_count`.

    Raises:
        ConfigError: a data set has no such metadata, or two have different ones.
    """
    key = f"MODEL.VISFT.{name.upper()}.FED_LOSS_CLASSES"
    found = []
    for dataset in cfg.DATASETS.TRAIN:
        counts = MetadataCatalog.get(dataset).get("class_image_count")
        if not counts:
            raise ConfigError(
                f"{key} is set, but the metadata of {dataset} do not say how frequent its classes are "
                "(`class_image_count`, a list of {id, image_count}, as LVIS v1 has it): fill them in, or set it to 0"
            )
        found.append([c["image_count"] for c in sorted(counts, key=lambda c: c["id"])])
    if any(counts != found[0] for counts in found):
        raise ConfigError(f"{key} is set, but {', '.join(cfg.DATASETS.TRAIN)} differ in `class_image_count`")
    return found[0]
