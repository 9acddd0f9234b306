"""Losses of the three heads, layer by layer and image by image, on the layers of our heads."""

from functools import partial

import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from visft.errors import ConfigError
from visft.modeling.heads import CaptionHead, DETRHead, HeadInputs, Mask2FormerHead, VisftHead
from visft.modeling.heads.base import bit_masks
from visft.modeling.heads.common.layers import Attention


def make_plain(head: VisftHead) -> None:
    """Replace a head's losses and attention, in place.

    Raises:
        ConfigError: another head than the paper's three, or other options of its losses.
    """
    plain = {DETRHead: detection_losses, Mask2FormerHead: mask_losses, CaptionHead: caption_losses}
    if type(head) not in plain or getattr(getattr(head, "classification", None), "pairs", False):
        raise ConfigError(
            f"the reference recipe has no {type(head).__name__} with these options; its heads are DETRHead and "
            "Mask2FormerHead with CLASS_LOSS softmax, and CaptionHead"
        )
    head.losses = partial(plain[type(head)], head)
    for module in head.modules():
        if isinstance(module, Attention):
            module.forward = partial(attention, module)


def attention(
    layer: Attention, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """PyTorch's own, which computes the scores to return them; its mask has a copy for each head."""
    if allowed is not None:
        n, heads = len(query), layer.num_heads
        allowed = ~allowed.expand(n, heads, query.shape[1], key.shape[1]).flatten(0, 1)
    return nn.MultiheadAttention.forward(layer, query, key, value, attn_mask=allowed, need_weights=True)[0]


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Matched queries and targets of one layer and image, given costs `[Q, T]`."""
    rows, columns = linear_sum_assignment(cost.cpu())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def named(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The last layer's losses under their names, auxiliary ones with their layer's number."""
    losses = dict(layers[-1])
    for i, layer in enumerate(layers[:-1]):
        losses |= {f"{name}_{i}": value for name, value in layer.items()}
    return losses


def class_loss(
    head: VisftHead, logits: Tensor, labels: list[Tensor], pairs: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Weighted cross-entropy of one layer's logits `[N, Q, classes + 1]`, the mean over the queries' weights."""
    target = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
    for row, label, (queries, targets) in zip(target, labels, pairs, strict=True):
        row[queries] = label[targets]
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1] = head.no_object_weight
    return head.class_weight * F.cross_entropy(logits.transpose(1, 2), target, weight)


# Detection (DETR)


def detection_losses(head: DETRHead, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
    """As `DETRHead.losses`."""
    output, device = head(inputs.features, inputs.padding_mask), inputs.features.device
    labels = head.target_labels(inputs.images, device)
    boxes = []
    for image, (height, width) in zip(inputs.images, inputs.image_sizes, strict=True):
        corners = image["instances"].gt_boxes.tensor.to(device)
        corners = corners / corners.new_tensor([width, height, width, height])
        boxes.append(torchvision.ops.box_convert(corners, "xyxy", "cxcywh"))
    layers = []
    for logits, found in zip(output.logits, output.boxes, strict=True):
        pairs = match_boxes(head, logits, found, labels, boxes)
        source = torch.cat([f[queries] for f, (queries, _) in zip(found, pairs, strict=True)])
        target = torch.cat([b[targets] for b, (_, targets) in zip(boxes, pairs, strict=True)])
        giou = torchvision.ops.generalized_box_iou(corners_of(source), corners_of(target)).diag()
        layers.append(
            {
                "loss_ce": class_loss(head, logits, labels, pairs),
                "loss_bbox": head.l1_weight * F.l1_loss(source, target, reduction="sum") / normalizers[0],
                "loss_giou": head.giou_weight * (1 - giou).sum() / normalizers[0],
            }
        )
    return named(layers)


@torch.no_grad()
def match_boxes(
    head: DETRHead, logits: Tensor, found: Tensor, labels: list[Tensor], boxes: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The pairs of one layer, image by image."""
    pairs = []
    for i, (label, target) in enumerate(zip(labels, boxes, strict=True)):
        cost_class = -logits[i].softmax(-1)[:, label]
        cost_l1 = torch.cdist(found[i], target, p=1)
        cost_giou = -torchvision.ops.generalized_box_iou(corners_of(found[i]), corners_of(target))
        pairs.append(
            assign(head.class_weight * cost_class + head.l1_weight * cost_l1 + head.giou_weight * cost_giou)
        )
    return pairs


def corners_of(boxes: Tensor) -> Tensor:
    return torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")


# Segmentation (Mask2Former)


def mask_losses(head: Mask2FormerHead, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
    """As `Mask2FormerHead.losses`, at the same random points."""
    output, device = head(inputs.features), inputs.features.device
    points = head._random_points(inputs.images, device)
    labels = head.target_labels(inputs.images, device)
    masks = [padded_masks(image, inputs.padded_size).to(device) for image in inputs.images]
    layers = []
    for logits, found in zip(output.logits, output.masks, strict=True):
        pairs = match_masks(head, logits, found, labels, masks, points)
        bce = dice = found.sum() * 0
        for f, mask, at, (queries, targets) in zip(found, masks, points, pairs, strict=True):
            if len(queries):
                source, target = f[queries][:, None], mask[targets][:, None]
                at = uncertain_points(head, source.detach(), at[head.num_points :])
                source, target = sample(source, at), sample(target, at)
                bce = bce + F.binary_cross_entropy_with_logits(source, target, reduction="none").mean(1).sum()
                dice = dice + dice_loss(source.sigmoid(), target).sum()
        layers.append(
            {
                "loss_ce": class_loss(head, logits, labels, pairs),
                "loss_mask": head.mask_weight * bce / normalizers[0],
                "loss_dice": head.dice_weight * dice / normalizers[0],
            }
        )
    return named(layers)


def padded_masks(image: dict, size: tuple[int, int]) -> Tensor:
    """The annotated masks as floats, `[T, H, W]`, padded like the batch."""
    masks = bit_masks(image["instances"].gt_masks, image["instances"].image_size).float()
    return F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1]))


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps `[M, 1, h, w]` at points `[M, P, 2]` (x, y; 0..1 over the map) -> `[M, P]`."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    return 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)


def uncertain_points(head: Mask2FormerHead, masks: Tensor, points: Tensor) -> Tensor:
    """Of each mask `[M, 1, h, w]` its candidates next to the border, then the random points: `[M, P, 2]`."""
    points = points.expand(len(masks), -1, -1)
    candidates, others = points.split([head.num_candidates, points.shape[1] - head.num_candidates], dim=1)
    nearest = (-sample(masks, candidates).abs()).topk(head.num_important, dim=1).indices
    return torch.cat([candidates.gather(1, nearest[..., None].expand(-1, -1, 2)), others], dim=1)


@torch.no_grad()
def match_masks(
    head: Mask2FormerHead,
    logits: Tensor,
    found: Tensor,
    labels: list[Tensor],
    masks: list[Tensor],
    points: list[Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """The pairs of one layer, image by image."""
    pairs = []
    for i, (label, mask, at) in enumerate(zip(labels, masks, points, strict=True)):
        at = at[None, : head.num_points]
        source = sample(found[i][:, None], at.expand(len(found[i]), -1, -1))
        target = sample(mask[:, None], at.expand(len(mask), -1, -1))
        as_object = F.binary_cross_entropy_with_logits(source, torch.ones_like(source), reduction="none")
        as_none = F.binary_cross_entropy_with_logits(source, torch.zeros_like(source), reduction="none")
        cost_mask = (as_object @ target.T + as_none @ (1 - target).T) / source.shape[1]
        overlap = source.sigmoid() @ target.T
        areas = source.sigmoid().sum(-1)[:, None] + target.sum(-1)[None]
        cost = head.class_weight * -logits[i].softmax(-1)[:, label]
        cost = cost + head.mask_weight * cost_mask
        pairs.append(assign(cost + head.dice_weight * (1 - (2 * overlap + 1) / (areas + 1))))
    return pairs


# Captions (Show, Attend and Tell)


def caption_losses(head: CaptionHead, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
    """As `CaptionHead.losses`: word by word, for the captions that are not yet at their end."""
    captions, decoder, cells = head._captions(inputs.images), head.decoder, head.cells(inputs.features)
    lengths = torch.tensor([len(caption) - 1 for caption in captions])
    order = lengths.argsort(descending=True)
    cells, lengths = cells[order], lengths[order]
    tokens = pad_sequence([captions[i] for i in order], batch_first=True).to(cells.device)
    words, mean = decoder.embedding(tokens), cells.mean(1)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    loss, attended = 0.0, cells.new_zeros(cells.shape[:2])
    for t in range(int(lengths.max())):
        n = int((lengths > t).sum())
        seen, alpha = look(decoder, cells[:n], h[:n])
        h, c = decoder.decode_step(torch.cat([words[:n, t], seen], dim=1), (h[:n], c[:n]))
        scores = decoder.fc(F.dropout(h, decoder.dropout, decoder.training))
        loss = loss + F.cross_entropy(scores, tokens[:n, t + 1], reduction="sum")
        attended = attended + F.pad(alpha, (0, 0, 0, len(cells) - n))
    return {
        "loss_words": loss / normalizers[0],
        "loss_attention": head.attention_weight * (1 - attended).square().mean(),
    }


def look(decoder: nn.Module, cells: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gated mean of the cells under soft attention, and the attention."""
    attention = decoder.attention
    compared = F.relu(attention.encoder_att(cells) + attention.decoder_att(h)[:, None])
    alpha = attention.full_att(compared).squeeze(2).softmax(dim=1)
    return decoder.f_beta(h).sigmoid() * (cells * alpha[..., None]).sum(1), alpha
