"""Training images and the heads that they have labels for."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from torch.utils.data import Dataset, Subset

from visft.data.datasets.coco import as_dataset, outlines_of
from visft.data.headers import ImageRules
from visft.data.repeat_factor import build_repeats
from visft.data.training_records import load_records
from visft.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """Training records, and the heads that they have labels for.

    Attributes:
        records: detectron2 dataset dicts.
        rows: for each head, the ascending indices of the records that it can learn from.
        repeats: how often each record occurs in an epoch (see `visft.data.repeat_factor`); None: once.
        mask_readers: the heads and tower losses that read masks; None: all.
    """

    records: Dataset
    rows: dict[str, np.ndarray]
    repeats: np.ndarray | None = None
    mask_readers: frozenset[str] | None = None

    def of(self, *heads: str) -> Dataset:
        """Return the images with labels for at least one of the heads, in their order."""
        rows = self._rows_of(heads)
        return self.records if len(rows) == len(self.records) else Subset(self.records, rows)

    def repeats_of(self, *heads: str) -> np.ndarray | None:
        """Return `repeats` of the images that `of` returns."""
        return None if self.repeats is None else self.repeats[self._rows_of(heads)]

    def masks_for(self, *names: str) -> bool:
        """Whether one of these heads and tower losses reads masks."""
        return self.mask_readers is None or not self.mask_readers.isdisjoint(names)

    def _rows_of(self, heads: Sequence[str]) -> np.ndarray:
        return functools.reduce(np.union1d, (self.rows[head] for head in heads))


def load_labelled(
    cfg: CfgNode,
    has_labels: Mapping[str, Callable[[dict], bool]],
    mask_readers: Iterable[str] | None = None,
) -> LabelledImages:
    """Load `DATASETS.TRAIN`, whose data sets may have different labels, and find the images for each head.

    Args:
        cfg: reads DATASETS.TRAIN, DATALOADER.{FILTER_EMPTY_ANNOTATIONS, SAMPLER_TRAIN, REPEAT_THRESHOLD,
            REPEAT_SQRT} and VISFT.TASK_MIXING.
        has_labels: the `has_labels` of each head and tower loss, by its name.
        mask_readers: the heads and tower losses that read masks; None: all.

    Raises:
        DataError: a data set is broken, no head has an image (with mixing by ratio: some head has none), or a tower
            loss can learn from none of the heads' images.
    """
    names = tuple(cfg.DATASETS.TRAIN)
    records = load_records(
        names,
        train=True,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        rules=ImageRules.of(cfg),
    )
    found = (labelled(o) for o in map(_outline, outlines_of(records)) for labelled in has_labels.values())
    table = np.fromiter(found, bool).reshape(len(records), len(has_labels))
    rows = {head: np.flatnonzero(column) for head, column in zip(has_labels, table.T, strict=True)}
    objectives = [name for name in rows if name in cfg.MODEL.VISFT.OBJECTIVES]
    heads = [name for name in rows if name not in objectives]
    missing = [head for head in heads if not len(rows[head])]
    if missing and (len(missing) == len(heads) or cfg.VISFT.TASK_MIXING == "ratio"):
        raise DataError(
            f"DATASETS.TRAIN ({', '.join(names)}): none of its {len(records)} images has labels for the head "
            f"`{missing[0]}`; add a data set with labels, or leave the head out of MODEL.VISFT.HEADS"
        )
    for head in missing:
        logger.warning("no image of %s has labels for the head %s: it learns nothing", names, head)
    drawn = functools.reduce(np.union1d, [rows[name] for name in heads or objectives])
    for name in objectives:
        if not len(np.intersect1d(rows[name], drawn)):
            raise DataError(
                f"DATASETS.TRAIN ({', '.join(names)}): the objective `{name}` can learn from none of its {len(drawn)} "
                "training images; add a data set for it, or leave it out of MODEL.VISFT.OBJECTIVES"
            )
    useful = len(drawn)
    if useful < len(records):
        logger.info(
            "%d of %d images have no labels to learn from and are left out",
            len(records) - useful,
            len(records),
        )
    return LabelledImages(
        as_dataset(records),
        rows,
        build_repeats(cfg, records),
        None if mask_readers is None else frozenset(mask_readers),
    )


def _outline(record: dict) -> dict:
    """Return an outline of the mapped record, enough for `has_labels` of a head. Reads no image."""
    image = {key: record[key] for key in ("file_name", "image_id", "captions") if record.get(key)}
    if "annotations" in record:
        count = sum(not annotation.get("iscrowd", 0) for annotation in record["annotations"])
        image["instances"] = _empty_instances(count, record["has_masks"])
    return image


@functools.lru_cache(maxsize=1024)  # most images share a few counts
def _empty_instances(count: int, has_masks: bool) -> Instances:
    instances = Instances((1, 1))
    instances.gt_boxes = Boxes(torch.zeros(count, 4))
    instances.gt_classes = torch.zeros(count, dtype=torch.int64)
    if has_masks:
        instances.gt_masks = BitMasks(torch.zeros(count, 1, 1, dtype=torch.bool))
    return instances
