"""The interface of a head, and what it reads of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadInputs:
    """What a head reads of a batch of N images."""

    features: Tensor
    """The tower's map `[N, C, h, w]`."""
    padding_mask: Tensor
    """`[N, h, w]` bool, True where a cell is padding."""
    images: list[dict]
    """The mapped dicts."""
    image_sizes: list[tuple[int, int]]
    """(height, width) in pixels before padding."""
    padded_size: tuple[int, int]
    """(height, width) in pixels that the map covers."""

    def select(self, indices: Sequence[int]) -> "HeadInputs":
        """The images with these indices, in their order."""
        if list(indices) == list(range(len(self.images))):
            return self  # no copy of the map
        return HeadInputs(
            self.features[indices],
            self.padding_mask[indices],
            [self.images[i] for i in indices],
            [self.image_sizes[i] for i in indices],
            self.padded_size,
        )

    @property
    def original_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images before they were resized."""
        sizes = zip(self.images, self.image_sizes, strict=True)
        return [(int(image.get("height", h)), int(image.get("width", w))) for image, (h, w) in sizes]


class VisftHead(nn.Module):
    """A task head on one feature map.

    It reads features, the padding mask and the batch; it does not depend on the tower or the stage.
    """

    label_fields: tuple[str, ...] = ()
    """Fields of `instances` that it learns from. An image that lacks one has no labels for this head."""

    class_layers: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules and parameters whose shape follows the number of classes (or words)."""

    @property
    def reads_masks(self) -> bool:
        """Whether it reads `gt_masks`. If nothing in a training does, none are rendered."""
        return "gt_masks" in self.label_fields

    @property
    def trainable(self) -> bool:
        """Whether it has weights of its own. Stage `heads` skips a head without any."""
        return any(True for _ in self.parameters())

    def bind(self, backbone: Backbone) -> None:
        """Take what the head needs of the tower besides its features; called once, when the model is built.

        By default nothing. A head holds what it takes by reference, not as a submodule.

        Raises:
            ConfigError: the tower lacks it.
        """

    @classmethod
    def needs_masks(cls, cfg: CfgNode) -> bool:
        """Whether each annotation must have a mask."""
        return "gt_masks" in cls.label_fields

    def has_labels(self, image: dict) -> bool:
        """Whether this image is annotated for this task, possibly with no objects."""
        return "instances" in image and all(has_targets(image, field) for field in self.label_fields)

    def draw(self) -> None:
        """Draw what a training pass needs at random, the same in all processes; called once, before `normalizers`."""

    def normalizers(self, images: list[dict]) -> Tensor:
        """[k] counts that the losses are divided by, known before the forward pass.

        The meta-architecture takes their mean over processes, so that the gradient is that of the joined batch.
        An empty list gives zeros.

        Raises:
            DataError: if an annotation does not fit the head.
        """
        raise NotImplementedError

    def losses(self, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
        """Weighted losses, each a scalar.

        Args:
            inputs: images that have labels, at least one.
            normalizers: [k], the mean of `normalizers` over all processes.
        """
        raise NotImplementedError

    def inference(self, inputs: HeadInputs) -> list[Instances] | list[str]:
        """One prediction an image, in coordinates of the original image (its `height` and `width`)."""
        raise NotImplementedError


def num_targets(image: dict) -> int:
    """How many objects are annotated on an image."""
    instances = image["instances"]
    return len(instances) if instances.get_fields() else 0


def has_targets(image: dict, field: str) -> bool:
    """Whether an image is annotated with `field`. A mapper may leave it out where there is nothing to find."""
    return "instances" in image and (image["instances"].has(field) or num_targets(image) == 0)


def bit_masks(masks: BitMasks | PolygonMasks | Tensor, size: tuple[int, int]) -> Tensor:
    """Annotated masks [T, height, width] of an image of this size, whatever form the mapper gave them."""
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *size)
    return masks.tensor if isinstance(masks, BitMasks) else torch.as_tensor(masks)


def nonzero_count(count: Tensor) -> Tensor:
    """A count to divide by: zero becomes one. Means over processes between zero and one stay.

    The authors raise such means to one as well; then two processes would not give the joined batch's gradient.
    """
    return torch.where(count > 0, count, torch.ones_like(count))
