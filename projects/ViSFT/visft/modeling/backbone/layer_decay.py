"""Layer-wise learning-rate decay of a CLIPViT, for detectron2's `get_default_optimizer_params(lr_factor_func=...)`."""

from collections.abc import Callable

from torch import nn

from visft.modeling.backbone.clip_vit import CLIPViT


def lr_factor(model: nn.Module, decay: float) -> Callable[[str], float]:
    """Learning-rate factors by parameter name (BEiT, arXiv:2106.08254, appendix; ViTDet, arXiv:2203.16527, A.1).

    Block i of n has decay^(n - i), what comes before the blocks decay^(n + 1), everything else 1.

    Args:
        model: the whole model, with one CLIPViT or several somewhere within.
        decay: MODEL.CLIP_VIT.LAYER_DECAY.

    Returns:
        A function of a parameter's name in `model`.
    """
    exponents: dict[int, int] = {}
    for backbone in (m for m in model.modules() if isinstance(m, CLIPViT)):
        depth = len(backbone.blocks)
        for parameter in backbone.stem_parameters():
            exponents[id(parameter)] = depth + 1
        for i, block in enumerate(backbone.blocks):
            for parameter in block.parameters():
                exponents[id(parameter)] = depth - i
    names = {name: exponents[id(p)] for name, p in model.named_parameters() if id(p) in exponents}
    return lambda name: decay ** names.get(name, 0)
