"""Maps an image and its annotations to the model's input. Decodes once, with boxes and masks in the same frame."""

import re

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from visft.data.images import MAX_PIXELS, read_annotated
from visft.data.instances import annotated_instances
from visft.errors import ConfigError

_OTHER_SIDE = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
_SIDES = re.compile(rf"\b(?:{'|'.join(_OTHER_SIDE)})\b", re.IGNORECASE)


class _OnePixelAtLeast:
    """A mixin for resizing augmentations: keeps sides of thin images from becoming 0."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class _ResizeShortestEdge(_OnePixelAtLeast, T.ResizeShortestEdge):
    pass


class _ResizeScale(_OnePixelAtLeast, T.ResizeScale):
    pass


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the training augmentations that `VISFT.INPUT.AUGMENTATION` names.

    `detection`: DETR's (Carion et al. 2020, section A.4): flip; half the time a first resize and a random crop; resize
    to a random short side. `lsj`: large-scale jitter (Ghiasi et al. 2021, section 3), without its padding, which the
    model does after normalising. `fixed`: resize the long side to SIZE, without cropping. `square`: resize both sides
    to SIZE.

    Raises:
        ConfigError: the recipe or INPUT.RANDOM_FLIP is unknown.
    """
    inp = cfg.VISFT.INPUT
    if cfg.INPUT.RANDOM_FLIP not in ("none", "horizontal", "vertical"):
        raise ConfigError(
            f"INPUT.RANDOM_FLIP is `{cfg.INPUT.RANDOM_FLIP}`; expected none, horizontal or vertical"
        )
    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if inp.AUGMENTATION == "detection":
        crop = [
            _ResizeShortestEdge(list(inp.CROP_RESIZE), sample_style="choice"),
            T.RandomCrop("absolute_range", tuple(inp.CROP_SIZE)),
        ]
        augmentations += [
            T.RandomApply(T.AugmentationList(crop), prob=inp.CROP_PROBABILITY),
            _ResizeShortestEdge(
                list(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
            ),
        ]
    elif inp.AUGMENTATION == "lsj":
        low, high = inp.JITTER_SCALE
        augmentations += [
            _ResizeScale(low, high, inp.SIZE, inp.SIZE),
            T.FixedSizeCrop((inp.SIZE, inp.SIZE), pad=False),
        ]
    elif inp.AUGMENTATION == "fixed":
        augmentations.append(_ResizeShortestEdge(inp.SIZE, inp.SIZE, "choice"))
    elif inp.AUGMENTATION == "square":
        augmentations.append(T.Resize(inp.SIZE))
    else:
        raise ConfigError(
            f"VISFT.INPUT.AUGMENTATION is `{inp.AUGMENTATION}`; expected detection, lsj, fixed or square"
        )
    return augmentations


class ViSFTMapper:
    """Maps a detectron2 dataset dict for every head at once.

    The result has

    - `image`: uint8 [3, H, W], RGB, resized, neither normalised nor padded;
    - `height`, `width`: of the annotated image; `file_name`, `image_id`;
    - in training `instances`: `gt_boxes` (xyxy in the resized image), `gt_classes` (contiguous), and `gt_masks`
      (BitMasks, from both polygons and run lengths) if the data set has masks and they are read. Crowds and objects
      that are completely cropped are left out. Every image of a data set with annotations has `instances`, even if
      empty;
    - in training `captions`: a list of strings, if the image has any. For a mirrored image, left and right are
      swapped in them.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        is_train: bool,
        reads_masks: bool = True,
        max_pixels: int = MAX_PIXELS,
    ):
        """
        Args:
            reads_masks: whether `gt_masks` are needed. Drawing them takes longer than decoding an image.
            max_pixels: an image with more pixels is refused; 0: no limit.
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.is_train, self.reads_masks, self.max_pixels = is_train, reads_masks, max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True, reads_masks: bool = True) -> dict:
        if is_train:
            augmentations = build_augmentations(cfg)
        else:
            augmentations = [_ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
        return {
            "augmentations": augmentations,
            "is_train": is_train,
            "reads_masks": reads_masks,
            "max_pixels": cfg.VISFT.DATA.MAX_PIXELS,
        }

    def read(self, record: dict) -> np.ndarray:
        """Read the image of a record in the frame of its annotations, uint8 [H, W, 3] RGB.

        Raises:
            ImageError: as in `visft.data.images.read_annotated`.
        """
        return read_annotated(record, max_pixels=self.max_pixels)

    def __call__(self, record: dict) -> dict:
        """
        Args:
            record: a dataset dict, not changed. Its key `has_masks` says whether every annotation of its data set has
                a mask (default: whether its own annotations do).

        Raises:
            ImageError: the image does not decode, or does not have the annotated size.
        """
        mapped, transforms = self.resized(self.read(record))
        mapped["file_name"] = record["file_name"]
        if "image_id" in record:
            mapped["image_id"] = record["image_id"]
        if self.is_train:
            if "annotations" in record:
                mapped["instances"] = annotated_instances(
                    record, transforms, tuple(mapped["image"].shape[1:]), with_masks=self.reads_masks
                )
            if record.get("captions"):
                mirrored = sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms) % 2
                captions = record["captions"]
                mapped["captions"] = [mirror(c) for c in captions] if mirrored else list(captions)
        return mapped

    def resized(self, image: np.ndarray) -> tuple[dict, T.TransformList]:
        """Return the model's input (`image`, `height`, `width`) for a uint8 [H, W, 3] RGB image, and the transforms."""
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        pixels = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": pixels, "height": image.shape[0], "width": image.shape[1]}, transforms


def mirror(caption: str) -> str:
    """Return the caption of the mirrored image, with English left and right swapped."""
    return _SIDES.sub(lambda found: _OTHER_SIDE[found[0].lower()], caption)


def build_test_mapper(cfg: CfgNode) -> ViSFTMapper:
    """Build the mapper from a record (`file_name` is enough) to the model's input in evaluation."""
    return ViSFTMapper(cfg, is_train=False)
