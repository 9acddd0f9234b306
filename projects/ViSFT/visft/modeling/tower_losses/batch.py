"""What objectives read in one forward pass: everything is computed once, when it is first asked for."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visft.modeling.backbone import CLIPViT, lora
from visft.modeling.backbone.sharding import is_sharded
from visft.modeling.heads.base import HeadInputs
from visft.utils import shared_random


class OriginalTower:
    """Embeddings of the tower that a CLIPViT was before tuning. No module: it is in no state and no checkpoint.

    Args:
        backbone: with LoRA, whose adapters are switched off for a pass; or without, which is copied as it is now.
    """

    def __init__(self, backbone: CLIPViT) -> None:
        self._backbone = backbone
        self._copy = None if lora.has_lora(backbone) else CLIPViT(copy.deepcopy(backbone.tower)).eval()

    @torch.no_grad()
    def image_embedding(self, images: Tensor) -> Tensor:
        """As `CLIPViT.image_embedding`, by the original weights: `[N, 3, H, W]` normalised -> `[N, D]`."""
        if self._copy is not None:
            return self._copy.to(images.device).image_embedding(images)
        with lora.switched_off(self._backbone):
            return self._backbone.image_embedding(images)


class Batch:
    """Images, and what the tower makes of them, now and before it was tuned.

    Args:
        backbone: the tower.
        images: the mapped dicts of all images; `image` is RGB `[3, H, W]`, 0..255.
        extract: gives the dense features of the images with these indices, with a graph; computed once for the same.
        draw: a number that everything random of this pass follows from, the same in all processes.
        device: where the tower is.

    Attributes:
        original: the tower before tuning, for the objectives that need it.
        ran: whether the tower has run for an objective.
        sharded: whether the tower is in pieces. All images then take part in every pass, so that all processes run
            the same passes, whichever images have labels.
    """

    def __init__(
        self,
        backbone: CLIPViT,
        images: Sequence[dict],
        extract: Callable[[tuple[int, ...]], HeadInputs],
        draw: int,
        device: torch.device,
    ) -> None:
        self.backbone, self.images, self.draw, self.device = backbone, images, draw, device
        self.original: OriginalTower | None = None
        self.ran = False
        self.sharded = is_sharded(backbone)
        self._extract = extract
        self._kept: dict[tuple, Tensor] = {}

    def features(self, rows: Sequence[int]) -> HeadInputs:
        """The tuned tower's map of images, as heads see it."""
        self.ran = True
        if self.sharded:
            return self._extract(tuple(range(len(self.images)))).select(list(rows))
        return self._extract(tuple(rows))

    def embeddings(self, rows: Sequence[int], size: int = 0) -> Tensor:
        """The tuned tower's CLIP embeddings `[len(rows), D]`, not of unit length, with a graph.

        Args:
            size: side in pixels to which both sides are resized; 0: the size that the tower was pretrained at.
        """
        self.ran = True
        return self._once("tuned", rows, size, self.backbone.image_embedding)

    def original_embeddings(self, rows: Sequence[int], size: int = 0) -> Tensor:
        """As `embeddings`, of the tower before tuning; without a graph."""
        return self._once("original", rows, size, self.original.image_embedding)

    def prepared(self, images: Sequence[Tensor], size: int = 0) -> Tensor:
        """Images `[3, h_i, w_i]`, 0..255, as the tower's embedding reads them `[N, 3, h, w]`.

        They are resized as for `embeddings` and normalised by the tower's own mean and standard deviation.
        """
        shape = (size, size) if size else self.backbone.image_size
        stacked = torch.stack([resized(image.to(self.device, non_blocking=True), shape) for image in images])
        mean, std = (stacked.new_tensor(v).view(3, 1, 1) for v in (self.backbone.mean, self.backbone.std))
        return (stacked / 255 - mean) / std

    def generator(self, row: int, purpose: str = "") -> torch.Generator:
        """A generator for one image and purpose in this pass; see `shared_random.image_generator`."""
        return shared_random.image_generator(self.draw, self.images[row], row, purpose)

    def _once(self, kind: str, rows: Sequence[int], size: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
        everyone = range(len(self.images))
        if self.sharded and list(rows) != list(everyone):
            return self._once(kind, everyone, size, compute)[list(rows)]
        images, result = ("images", tuple(rows), size), (kind, tuple(rows), size)
        if images not in self._kept:
            self._kept[images] = self.prepared([self.images[row]["image"] for row in rows], size)
        if result not in self._kept:
            self._kept[result] = compute(self._kept[images])
        return self._kept[result]


def resized(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """An image `[3, H, W]` at another size, as float32 in 0..255 (bicubic, antialiased, as CLIP's)."""
    image = image.float()
    if image.shape[1:] == shape:
        return image
    found = F.interpolate(image[None], shape, mode="bicubic", antialias=True, align_corners=False)[0]
    return found.clamp(0, 255)


def crop(image: Tensor, box: list[float]) -> Tensor:
    """The pixels `[3, h, w]` of an image `[3, H, W]` that a box touches, at least one each way."""
    height, width = image.shape[1:]
    x0, y0 = (min(int(v), side - 1) for v, side in ((box[0], width), (box[1], height)))
    x1, y1 = (int(-(-v // 1)) for v in box[2:])
    return image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
