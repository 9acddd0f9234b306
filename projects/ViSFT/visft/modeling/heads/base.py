"""What the meta-architecture asks of a head."""

from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.structures import Instances
from torch import Tensor, nn


class VisftHead(nn.Module):
    """A task head on one feature map.

    It sees features, the padding mask and the batch; not which tower made the features, nor which stage it is. `images`
    are the mapped dicts of the pictures it gets, `image_sizes` their (h, w) in pixels before padding, `padded_size` the
    (H, W) that the map covers. A padding mask is True where a cell is padding.
    """

    class_layers: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules and parameters whose shape follows the number of classes (or words)."""

    reads_masks: bool = True
    """Whether it reads `gt_masks`. Where nothing in a training does, none are drawn."""

    @property
    def trainable(self) -> bool:
        """Whether it has weights of its own. One that has none is passed over in stage `heads`."""
        return any(True for _ in self.parameters())

    def bind(self, backbone: Backbone) -> None:
        """Take what the head uses of the tower besides its features; called once, when the model is built.

        Nothing by default: a head sees features alone. One that does take something holds it by reference, not as a
        submodule.

        Raises:
            ConfigError: the tower does not have it.
        """

    @classmethod
    def needs_masks(cls, cfg: CfgNode) -> bool:
        """Whether each annotation must have a mask."""
        return False

    def has_labels(self, image: dict) -> bool:
        """Whether this picture is annotated for this task (perhaps with nothing to find)."""
        raise NotImplementedError

    def normalizers(self, images: list[dict]) -> Tensor:
        """[k] counts that the losses are divided by, known before the forward pass.

        The meta-architecture takes their mean over processes, so that the gradient is that of the joined batch.
        An empty list gives zeros.

        Raises:
            DataError: if an annotation does not fit the head.
        """
        raise NotImplementedError

    def losses(
        self,
        features: Tensor,
        padding_mask: Tensor,
        images: list[dict],
        image_sizes: list[tuple[int, int]],
        padded_size: tuple[int, int],
        normalizers: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted losses, each a scalar.

        Args:
            features: [N, C, h, w].
            padding_mask: [N, h, w] bool.
            normalizers: [k], the mean of `normalizers` over all processes.
        """
        raise NotImplementedError

    def inference(
        self,
        features: Tensor,
        padding_mask: Tensor,
        images: list[dict],
        image_sizes: list[tuple[int, int]],
        padded_size: tuple[int, int],
    ) -> list[Instances] | list[str]:
        """One prediction a picture, in coordinates of the original picture (its `height` and `width`)."""
        raise NotImplementedError


def original_size(image: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the picture before it was resized to `image_size`."""
    return int(image.get("height", image_size[0])), int(image.get("width", image_size[1]))


def num_targets(image: dict) -> int:
    """How many objects are annotated on a picture."""
    instances = image["instances"]
    return len(instances) if instances.get_fields() else 0


def has_targets(image: dict, field: str) -> bool:
    """Whether a picture is annotated with `field`. A mapper may leave it out where there is nothing to find."""
    return "instances" in image and (image["instances"].has(field) or num_targets(image) == 0)


def nonzero_count(count: Tensor) -> Tensor:
    """A count to divide by: zero becomes one. Means of counts over processes, smaller than one, stay.

    (The authors raise such means to one as well; then two processes would not give the joined batch's gradient.)
    """
    return torch.where(count > 0, count, torch.ones_like(count))


def loss_names(name: str, num_layers: int) -> list[str]:
    """Names of a loss on each of `num_layers` predictions: `name_0`, `name_1`, ..., and `name` for the last."""
    return [f"{name}_{i}" for i in range(num_layers - 1)] + [name]
