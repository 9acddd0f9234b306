"""What objectives look at in one forward pass: each thing is computed once, when it is first asked for."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.untuned_tower import OriginalTower
from visft.modeling.heads.base import HeadInputs
from visft.utils import shared_random


class Batch:
    """Images, and what the tower makes of them, now and before it was tuned.

    Args:
        backbone: the tower.
        images: the mapped dicts of all images; `image` is RGB `[3, H, W]`, 0..255.
        extract: the dense features of the images with these indices, with a graph; computed once for the same ones.
        draw: a number that everything random of this pass follows from, alike in all processes.
        device: where the tower is.

    Attributes:
        original: the tower before tuning, for the objectives that say so.
        ran: whether the tower has run for an objective.
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
        self._extract = extract
        self._kept: dict[tuple, Tensor] = {}

    def features(self, rows: Sequence[int]) -> HeadInputs:
        """The tuned tower's map of images, as heads see it."""
        self.ran = True
        return self._extract(tuple(rows))

    def embeddings(self, rows: Sequence[int], size: int = 0) -> Tensor:
        """The tuned tower's CLIP embeddings `[len(rows), D]`, not of unit length, with a graph; see `pictures`."""
        self.ran = True
        return self._once("tuned", rows, size, self.backbone.image_embedding)

    def original_embeddings(self, rows: Sequence[int], size: int = 0) -> Tensor:
        """As `embeddings`, of the tower before tuning; without a graph."""
        return self._once("original", rows, size, self.original.image_embedding)

    def pictures(self, rows: Sequence[int], size: int = 0) -> Tensor:
        """Whole images as the tower's embedding sees them `[len(rows), 3, h, w]`; both sides are resized.

        Args:
            size: side in pixels; 0: the size that the tower was pretrained at.
        """
        return self.prepared([self.images[row]["image"] for row in rows], size)

    def prepared(self, pictures: Sequence[Tensor], size: int = 0) -> Tensor:
        """Images `[3, h_i, w_i]`, 0..255, resized as `pictures`, normalised by the tower's own mean and deviation."""
        shape = (size, size) if size else self.backbone.image_size
        stacked = torch.stack(
            [resized(image.to(self.device, non_blocking=True), shape) for image in pictures]
        )
        mean, std = (stacked.new_tensor(v).view(3, 1, 1) for v in (self.backbone.mean, self.backbone.std))
        return (stacked / 255 - mean) / std

    def generator(self, row: int, word: str = "") -> torch.Generator:
        """A generator of its own for an image in this pass: the same whatever process the image is in.

        Args:
            word: tells apart what is drawn for several purposes.
        """
        return shared_random.image_generator(self.draw, self.images[row], row, word)

    def _once(self, kind: str, rows: Sequence[int], size: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
        key = (kind, tuple(rows), size)
        if key not in self._kept:
            seen = ("pictures", tuple(rows), size)
            if seen not in self._kept:
                self._kept[seen] = self.pictures(rows, size)
            self._kept[key] = compute(self._kept[seen])
        return self._kept[key]


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
