"""An anchor: the tuned tower's embedding of a picture stays near that of the tower before tuning."""

from detectron2.config import CfgNode
from torch import Tensor

from visft.backbone import CLIPViT
from visft.objectives.base import Objective, check_size, cosine_distance
from visft.objectives.batch import Batch
from visft.objectives.registry import VISFT_OBJECTIVES_REGISTRY


@VISFT_OBJECTIVES_REGISTRY.register()
class Anchor(Objective):
    """1 - cosine of the two CLIP embeddings of a whole picture; the mean over pictures, with or without labels."""

    needs_original = True

    def __init__(self, cfg: CfgNode, name: str, backbone: CLIPViT) -> None:
        super().__init__(cfg, name, backbone)
        self.size = cfg.MODEL.VISFT[name.upper()].SIZE

    @classmethod
    def check(cls, cfg: CfgNode, name: str) -> None:
        super().check(cfg, name)
        check_size(cfg, f"MODEL.VISFT.{name.upper()}.SIZE", cfg.MODEL.VISFT[name.upper()].SIZE)

    def has_labels(self, image: dict) -> bool:
        return True

    def loss(self, batch: Batch, rows: list[int], normalizer: Tensor) -> Tensor:
        original = batch.original_embeddings(rows, self.size)
        return cosine_distance(batch.embeddings(rows, self.size), original).sum() / normalizer
