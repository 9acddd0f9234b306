"""Data of stock detectors: detectron2's mapper and samplers, with ViSFT's records and image reader."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.build import filter_images_with_few_keypoints, print_instances_class_histogram
from PIL import Image
from torch.utils.data import DataLoader

from visft.data.datasets.coco import as_dataset, outlines_of
from visft.data.headers import ImageRules
from visft.data.images import ImageError, read_annotated
from visft.data.loader import TestLoader
from visft.data.training_records import load_records
from visft.data.workers import num_workers, pins_memory


class StockMapper(DatasetMapper):
    """detectron2's mapper, with images in the frame of their annotations and at most VISFT.DATA.MAX_PIXELS pixels.

    Masks can be run lengths with any INPUT.MASK_FORMAT.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        super().__init__(cfg, is_train)
        self._max_pixels = cfg.VISFT.DATA.MAX_PIXELS
        self._skip_broken = is_train and cfg.DATALOADER.SKIP_BROKEN

    def __call__(self, record: dict) -> dict | None:
        """Map a record like DatasetMapper.

        With DATALOADER.SKIP_BROKEN, returns None for a bad image, and detectron2's loader takes another image.

        Raises:
            ImageError: the image does not decode, or does not have the annotated size.
        """
        try:
            pixels = read_annotated(record, max_pixels=self._max_pixels)
        except ImageError:
            if self._skip_broken:
                return None
            raise
        mapped = copy.deepcopy(record)
        labels = mapped.pop("sem_seg_file_name", None) if self.is_train else None
        augmented = T.AugInput(
            utils.convert_PIL_to_numpy(Image.fromarray(pixels), self.image_format),
            sem_seg=None if labels is None else utils.read_image(labels, "L").squeeze(2),
        )
        transforms = self.augmentations(augmented)
        mapped["height"], mapped["width"] = pixels.shape[:2]
        mapped["image"] = torch.from_numpy(np.array(augmented.image.transpose(2, 0, 1), order="C"))
        if augmented.sem_seg is not None:
            mapped["sem_seg"] = torch.from_numpy(augmented.sem_seg.astype(np.int64))
        size = augmented.image.shape[:2]
        if not self.is_train:
            mapped.pop("annotations", None)
            mapped.pop("sem_seg_file_name", None)
        elif "annotations" in mapped:
            self._transform_annotations(mapped, transforms, size)
        return mapped

    def _transform_annotations(
        self, mapped: dict, transforms: T.TransformList, size: tuple[int, int]
    ) -> None:
        stated = self.instance_mask_format
        if any(
            isinstance(a.get("segmentation"), dict) for a in mapped["annotations"] if not a.get("iscrowd")
        ):
            self.instance_mask_format = "bitmask"
        try:
            super()._transform_annotations(mapped, transforms, size)
        finally:
            self.instance_mask_format = stated


def stock_records(cfg: CfgNode, names: Sequence[str], *, train: bool) -> Sequence[dict]:
    """Return dataset dicts like detectron2's `get_detection_dataset_dicts`, from checked data sets.

    Raises:
        DataError: a data set is broken (see `check_registered`), or no image is left.
    """
    records = load_records(
        tuple(names),
        train=train,
        filter_empty=train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        rules=ImageRules.of(cfg),
        captions=False,
    )
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON and train else 0
    return filter_images_with_few_keypoints(list(records), least) if least > 0 else records


def build_stock_train_loader(cfg: CfgNode) -> DataLoader:
    """Build detectron2's loader of `DATASETS.TRAIN`, with its samplers, from `stock_records`."""
    records = stock_records(cfg, cfg.DATASETS.TRAIN, train=True)
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if classes and "annotations" in records[0]:
        print_instances_class_histogram(outlines_of(records), classes)
    return build_detection_train_loader(cfg, mapper=StockMapper(cfg, True), dataset=as_dataset(records))


def build_stock_test_loader(cfg: CfgNode, name: str) -> TestLoader:
    """Build one pass over a data set with one image per batch."""
    return TestLoader(
        stock_records(cfg, (name,), train=False),
        StockMapper(cfg, False),
        num_workers=num_workers(cfg),
        pin_memory=pins_memory(cfg),
        skip_broken=cfg.DATALOADER.SKIP_BROKEN,
    )
