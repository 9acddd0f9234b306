"""Zero-shot accuracy of the demo tower during training."""

import torch
from detectron2.config import CfgNode
from torch import nn

from visft.data.datasets import demo_world


def applies(cfg: CfgNode) -> bool:
    """Whether a config's tower has this test: the pretrained demo tower has, unless DATASETS.TEST is empty."""
    vit = cfg.MODEL.CLIP_VIT
    return bool(cfg.DATASETS.TEST) and vit.NAME == "visft-tiny" and bool(vit.PRETRAINED)


class _Encoder(nn.Module):
    """The image side of a CLIP whose tower is a CLIPViT, with or without LoRA."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """`[N, 3, H, W]` normalised -> `[N, D]`."""
        device = next(self.backbone.parameters()).device
        embedding = self.backbone.image_embedding(images.to(device)).cpu()
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding


@torch.no_grad()
def demo_zero_shot(backbone: nn.Module) -> dict[str, float]:
    """Zero-shot top-1 and top-5 in per cent on unseen views of all classes of the demo tower's pretraining.

    The text tower is the base CLIP's, which fine-tuning does not change.
    """
    from demoworld import tower
    from demoworld.views import Views

    training = backbone.training
    backbone.eval()
    with demo_world.errors():
        views = Views()
    classes = tower.class_embeddings(backbone.base_clip(visual=False).eval(), views.names)
    found = tower.zero_shot(_Encoder(backbone), views.evaluation(0, views=1), classes)
    backbone.train(training)
    return {"zero_shot/top1": found["top1"], "zero_shot/top5": found["top5"]}
