"""ViSFT's training step as its authors' release does it (arXiv 2401.10222), for comparison with ours.

Written to be read, not to be fast:

- the LoRA of a block is one dense matrix B A, applied beside the frozen projection (loralib's MergedLinear);
- attention is explicit, as in its EVA-G: scores, softmax, product with the values;
- blocks are checkpointed reentrantly, which needs a graph from the patch embedding on;
- an iteration is one task: the tower's pass serves one head;
- losses are computed layer by layer, predictions are matched image by image on the CPU.

What surrounds it is ours and the same for both: images, weights, heads' layers, optimizer, clipping.
"""

import plain_heads
from plain_tower import PlainTower

from visft.errors import ConfigError
from visft.modeling.meta_arch import ViSFT


def as_reference(model: ViSFT) -> ViSFT:
    """Let a model with our weights compute the authors' way, in place; of each batch, one `task` at a time.

    Call it after `set_stage`.

    Raises:
        ConfigError: the recipe has no such tower, adapter, head or tower loss.
    """
    if model.objectives:
        raise ConfigError('the reference recipe has no tower losses; set MODEL.VISFT.OBJECTIVES "()"')
    model.backbone.forward = PlainTower(model.backbone)
    model.backbone.activation_checkpointing = True
    for head in model.heads.values():
        plain_heads.make_plain(head)
    return model
