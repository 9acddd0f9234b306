"""Dense features learn from the tower's own embeddings of crops: the idea of CLIPSelf (Wu et al., arXiv 2310.01403)."""

import torch
from detectron2.config import CfgNode
from torch import Tensor

from visft.errors import ConfigError, check_one_of
from visft.modeling.backbone import CLIPViT
from visft.modeling.heads.base import has_targets, num_targets
from visft.modeling.heads.common import region_pooling
from visft.modeling.tower_losses.base import Objective, cosine_distance
from visft.modeling.tower_losses.batch import Batch, crop
from visft.modeling.tower_losses.build import VISFT_OBJECTIVES_REGISTRY

REGIONS = ("boxes", "grid")


@VISFT_OBJECTIVES_REGISTRY.register()
class SelfDistillation(Objective):
    """1 - cosine of a region's dense feature and the original tower's embedding of the region cut out; the mean over
    regions (CLIPSelf, section 3.3).

    A region's feature is the mean of the tuned map over its box, brought into the space of embeddings as one patch is.
    Regions are the annotated boxes, or a grid over the image of m x n patches, m and n drawn for each image.
    """

    needs_original = True
    reads_masks = False

    def __init__(self, cfg: CfgNode, name: str, backbone: CLIPViT) -> None:
        super().__init__(cfg, name, backbone)
        node = cfg.MODEL.VISFT[name.upper()]
        self.kind, self.grid, self.most = node.REGIONS, node.GRID, node.MAX_REGIONS

    @classmethod
    def check(cls, cfg: CfgNode, name: str) -> None:
        super().check(cfg, name)
        key, node = f"MODEL.VISFT.{name.upper()}", cfg.MODEL.VISFT[name.upper()]
        check_one_of(f"{key}.REGIONS", node.REGIONS, REGIONS)
        if node.GRID < 1:
            raise ConfigError(
                f"{key}.GRID is {node.GRID}; expected the largest number of rows and columns, 1 or more"
            )
        if node.MAX_REGIONS < 0:
            raise ConfigError(
                f"{key}.MAX_REGIONS is {node.MAX_REGIONS}; expected 0 (all) or a number of regions"
            )

    def has_labels(self, image: dict) -> bool:
        return self.kind == "grid" or (has_targets(image, "gt_boxes") and num_targets(image) > 0)

    def count(self, batch: Batch, rows: list[int]) -> int:
        return sum(len(self.regions(batch, row)) for row in rows)

    def loss(self, batch: Batch, rows: list[int], normalizer: Tensor) -> Tensor:
        boxes = [self.regions(batch, row) for row in rows]
        inputs, means, crops = batch.features(rows), [], []
        grid = tuple(inputs.features.shape[-2:])
        for row, features, own in zip(rows, inputs.features, boxes, strict=True):
            coverage = region_pooling.box_coverage(own.to(features.device), inputs.padded_size, grid)
            means.append(region_pooling.pool(features, coverage))
            crops += [crop(batch.images[row]["image"], box) for box in own.tolist()]
        found = batch.backbone.patch_embeddings(torch.cat(means))
        expected = batch.original.image_embedding(batch.prepared(crops))
        return cosine_distance(found, expected).sum() / normalizer

    def regions(self, batch: Batch, row: int) -> Tensor:
        """Boxes of an image `[R, 4]` (x0, y0, x1, y1 in pixels of the resized image), at least one."""
        image, generator = batch.images[row], batch.generator(row, "regions")
        if self.kind == "boxes" and self.has_labels(image):
            boxes = image["instances"].gt_boxes.tensor.float().cpu()
        else:
            down, across = (int(n) for n in torch.randint(1, self.grid + 1, (2,), generator=generator))
            height, width = image["image"].shape[1:]
            y, x = (torch.linspace(0, side, n + 1) for side, n in ((height, down), (width, across)))
            corners = [(x[j], y[i], x[j + 1], y[i + 1]) for i in range(down) for j in range(across)]
            boxes = torch.tensor(corners)
        if self.most and len(boxes) > self.most:
            boxes = boxes[torch.randperm(len(boxes), generator=generator)[: self.most].sort().values]
        return boxes
