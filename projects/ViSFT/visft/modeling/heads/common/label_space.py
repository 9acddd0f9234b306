"""How many classes a head has, and which of its outputs is which class."""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata
from torch import Tensor

from visft.classes.dataset_classes import filled_metadata
from visft.errors import ConfigError, DataError, check_one_of
from visft.modeling.heads.base import num_targets

LABEL_SPACES = ("contiguous", "dataset_id")
"""Values of LABEL_SPACE."""


@dataclass(frozen=True)
class LabelSpace:
    """The class outputs of a head: 0 .. num_classes - 1, and no-object at num_classes."""

    num_classes: int
    dataset_ids: tuple[int, ...] = ()
    """The output of each contiguous class, where outputs are the data set's own ids; (): they are contiguous."""

    def check(self, images: list[dict]) -> None:
        """Refuse images with an annotation of a class that the head does not have.

        Raises:
            DataError: names image and class.
        """
        known = len(self.dataset_ids) or self.num_classes
        for image in images:
            largest = int(image["instances"].gt_classes.max()) if num_targets(image) else 0
            if not 0 <= largest < known:
                raise DataError(
                    f"{image.get('file_name', 'an image')}: annotated with class {largest}, but the head has the "
                    f"classes 0 to {known - 1}: set its NUM_CLASSES to 0 (as the data set says) or to the data set's "
                    "number"
                )

    def encode(self, classes: Tensor) -> Tensor:
        """Outputs of contiguous classes [T], as detectron2's `gt_classes` are."""
        if not self.dataset_ids:
            return classes
        return torch.as_tensor(self.dataset_ids, device=classes.device)[classes]

    def decode(self, probabilities: Tensor) -> Tensor:
        """[..., num_classes + 1] probabilities of the outputs -> [..., number of contiguous classes]."""
        if not self.dataset_ids:
            return probabilities[..., : self.num_classes]
        return probabilities[..., torch.as_tensor(self.dataset_ids, device=probabilities.device)]


def label_space(cfg: CfgNode, name: str) -> LabelSpace:
    """The label space of the head `name`, from its NUM_CLASSES and LABEL_SPACE and the metadata of DATASETS.TRAIN[0].

    Models are built before loaders: a data set whose metadata is not filled yet is loaded to fill it.

    Raises:
        ConfigError: if the keys contradict each other, or the number of classes is not known.
    """
    node, key = cfg.MODEL.VISFT[name.upper()], f"MODEL.VISFT.{name.upper()}"
    check_one_of(f"{key}.LABEL_SPACE", node.LABEL_SPACE, LABEL_SPACES)
    if node.NUM_CLASSES < 0:
        raise ConfigError(f"{key}.NUM_CLASSES is {node.NUM_CLASSES}: give a number of classes, or 0")
    if node.LABEL_SPACE == "contiguous":
        return LabelSpace(node.NUM_CLASSES or len(_metadata(cfg, key, "thing_classes")))
    contiguous = _metadata(cfg, key, "thing_dataset_id_to_contiguous_id")
    ids = tuple(sorted(contiguous, key=contiguous.get))
    if min(ids) < 0:
        raise ConfigError(
            f"{key}.LABEL_SPACE is `dataset_id`, but {cfg.DATASETS.TRAIN[0]} has the negative category id "
            f"{min(ids)}: use `contiguous`"
        )
    if node.NUM_CLASSES and node.NUM_CLASSES <= max(ids):
        raise ConfigError(
            f"{key}.NUM_CLASSES is {node.NUM_CLASSES}, but {cfg.DATASETS.TRAIN[0]} has category id {max(ids)}: "
            f"with LABEL_SPACE `dataset_id` at least {max(ids) + 1} are needed (0: as many)"
        )
    return LabelSpace(node.NUM_CLASSES or max(ids) + 1, ids)


def _metadata(cfg: CfgNode, key: str, field: str):
    otherwise = f"{key}.NUM_CLASSES with LABEL_SPACE `contiguous`"
    purpose = "which says how many classes the head has"
    return train_metadata(cfg, field, purpose, otherwise=otherwise).get(field)


def train_metadata(cfg: CfgNode, field: str, purpose: str, *, otherwise: str = "") -> Metadata:
    """The metadata of DATASETS.TRAIN[0], which is loaded to fill them where they lack a field.

    Args:
        field: what they must have.
        purpose: for the message, what it is for.
        otherwise: for the message, the key that does without; "": there is none.

    Raises:
        ConfigError: there is no such data set, or it does not have the field.
    """
    instead = f", or set {otherwise}" if otherwise else ""
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(f"DATASETS.TRAIN is empty, so there is no {field}, {purpose}: set it{instead}")
    dataset = cfg.DATASETS.TRAIN[0]
    if dataset not in DatasetCatalog.list():
        raise ConfigError(f"DATASETS.TRAIN names {dataset!r}, which is not a registered data set: correct it")
    metadata = filled_metadata(dataset, field)
    if not metadata.get(field):
        raise ConfigError(
            f"the metadata of {dataset} has no {field}, {purpose}: fill it when registering the data set{instead}"
        )
    return metadata
