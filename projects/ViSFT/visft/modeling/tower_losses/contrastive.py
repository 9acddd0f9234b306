"""CLIP's own training, continued on the images and captions of the fine-tuning."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor

from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.text_encoder import TextTower
from visft.modeling.distributed import gather_rows, row_counts, zero_for
from visft.modeling.heads.captioning.vocabulary import worded_captions
from visft.modeling.heads.common.full_precision import without_autocast
from visft.modeling.tower_losses.base import Objective, check_size
from visft.modeling.tower_losses.batch import Batch
from visft.modeling.tower_losses.build import VISFT_OBJECTIVES_REGISTRY


@VISFT_OBJECTIVES_REGISTRY.register()
class Contrastive(Objective):
    """Symmetric cross-entropy of images and captions (CLIP, arXiv 2103.00020, figure 3), all processes' together.

    The text tower and the logit scale are the base's and frozen. One caption of an image is drawn for a pass. Images
    whose captions are the same to the text tower are no negatives of each other: such a pair is left out of both
    softmaxes, and each image's target stays its own caption.
    """

    collective = True
    reads_captions = True
    reads_masks = False

    def __init__(self, cfg: CfgNode, name: str, backbone: CLIPViT) -> None:
        super().__init__(cfg, name, backbone)
        self.size = cfg.MODEL.VISFT[name.upper()].SIZE
        self.text = TextTower(backbone)

    @classmethod
    def check(cls, cfg: CfgNode, name: str) -> None:
        super().check(cfg, name)
        check_size(cfg, f"MODEL.VISFT.{name.upper()}.SIZE", cfg.MODEL.VISFT[name.upper()].SIZE)

    def has_labels(self, image: dict) -> bool:
        return bool(worded_captions(image))

    def loss(self, batch: Batch, rows: list[int], normalizer: Tensor) -> Tensor:
        tokens = self.text.tokens([self.caption(batch, row) for row in rows] or [""], batch.device)
        texts = self.text(tokens)
        if not rows:  # only their shape is needed, to take part
            tokens, texts = tokens[:0], texts[:0]
        if rows or batch.sharded:
            images = F.normalize(batch.embeddings(rows, self.size).float(), dim=-1)
        else:
            images = texts + zero_for(batch.backbone.parameters(), batch.device)
        counts = row_counts(len(rows), batch.device)
        everyone = [gather_rows(part, counts) for part in (images, texts, tokens)]
        first = sum(counts[: comm.get_rank()])
        return symmetric_loss((images, texts, tokens), everyone, first, self.text.logit_scale) / normalizer

    def caption(self, batch: Batch, row: int) -> str:
        """The caption of an image that this pass learns."""
        captions = worded_captions(batch.images[row])
        return captions[int(torch.randint(len(captions), (1,), generator=batch.generator(row)))]


@without_autocast
def symmetric_loss(
    own: tuple[Tensor, Tensor, Tensor], everyone: list[Tensor], first: int, scale: float
) -> Tensor:
    """The sum over own pairs of the mean of both cross-entropies.

    Args:
        own: image embeddings and text embeddings `[n, D]` of unit length, and tokens `[n, L]`.
        everyone: the same of all processes `[N, ...]`.
        first: where the own rows begin in them.
        scale: of the cosines.
    """
    (images, texts, tokens), (all_images, all_texts, all_tokens) = own, everyone
    target = torch.arange(first, first + len(images), device=images.device)
    same = (tokens[:, None] == all_tokens[None]).all(-1)
    same[torch.arange(len(images), device=images.device), target] = False
    total = images.new_zeros(())
    for rows, columns in ((images, all_texts), (texts, all_images)):
        logits = (scale * rows @ columns.T).masked_fill(same, float("-inf"))
        total = total + F.cross_entropy(logits, target, reduction="sum") / 2
    return total
