"""The tower as it was before tuning, beside the one that is tuned."""

import copy

import torch

from visft.modeling.backbone import lora
from visft.modeling.backbone.clip_vit import CLIPViT


class OriginalTower:
    """Embeddings of the tower that a CLIPViT was before it was tuned. No module: it is in no state and no checkpoint.

    Args:
        backbone: with LoRA, whose adapters are switched off for a pass; or without, of which, as it is now, a frozen
            copy is made.
    """

    def __init__(self, backbone: CLIPViT) -> None:
        self._backbone = backbone
        self._copy = None if lora.has_lora(backbone) else CLIPViT(copy.deepcopy(backbone.tower)).eval()

    @torch.no_grad()
    def image_embedding(self, images: torch.Tensor) -> torch.Tensor:
        """As `CLIPViT.image_embedding`, by the original weights: `[N, 3, H, W]` normalised -> `[N, D]`."""
        if self._copy is not None:
            return self._copy.to(images.device).image_embedding(images)
        with lora.switched_off(self._backbone):
            return self._backbone.image_embedding(images)
