"""Zero-shot accuracy of the demo tower during training."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from visft.data.datasets import demo_world


def applies(cfg: CfgNode) -> bool:
    """Whether a config's tower has this test: the pretrained demo tower has, unless DATASETS.TEST is empty."""
    vit = cfg.MODEL.CLIP_VIT
    return bool(cfg.DATASETS.TEST) and vit.NAME == "visft-tiny" and bool(vit.PRETRAINED)


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
    device = next(backbone.parameters()).device

    def encode_image(images: torch.Tensor, normalize: bool) -> torch.Tensor:
        return F.normalize(backbone.image_embedding(images.to(device)).cpu(), dim=-1)

    classes = tower.class_embeddings(backbone.base_clip(visual=False).eval(), views.names)
    found = tower.zero_shot(SimpleNamespace(encode_image=encode_image), views.evaluation(0, views=1), classes)
    backbone.train(training)
    return {"zero_shot/top1": found["top1"], "zero_shot/top5": found["top5"]}
