"""Instance segmentation by Mask2Former (arXiv 2112.01527) on one scale."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from visft.errors import ConfigError
from visft.modeling.heads.base import HeadInputs, bit_masks, num_targets
from visft.modeling.heads.build import VISFT_HEADS_REGISTRY
from visft.modeling.heads.common.full_precision import without_autocast
from visft.modeling.heads.common.losses import (
    dice_loss,
    mask_loss,
    pairwise_mask_costs,
    rows_at_once,
    sample_masks,
    sample_points,
)
from visft.modeling.heads.common.matcher import Matching, match
from visft.modeling.heads.common.query_head import QueryHead
from visft.modeling.heads.mask2former.mask_decoder import MaskDecoder, MaskOutput
from visft.modeling.heads.mask2former.pixel_decoder import PixelDecoder
from visft.utils import shared_random

_CHUNK = 32
"""Annotated masks that are sampled at a time: hundreds of a large image take gigabytes."""


@dataclass(frozen=True)
class MaskTargets:
    """Labels [N, T], padded; each image's masks at its random points."""

    labels: Tensor
    samples: list[Tensor]
    """[T_i, P]"""
    points: list[Tensor]
    """[P, 2], 0..1 over the padded image: `num_points` for the matching, the candidates, then the random ones."""


@VISFT_HEADS_REGISTRY.register()
class Mask2FormerHead(QueryHead):
    """Masks from learned queries, trained by matching them one to one with the annotated masks.

    Masks are compared at random points (PointRend, arXiv 1912.08193), drawn from the global generator of the CPU and
    the image's id: processes that share a seed draw what one process with all their images would.
    """

    class_layers = ("predictor.class_embed",)
    label_fields = ("gt_masks",)

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        encoder_layers: int = 6,
        encoder_feedforward_dim: int = 512,
        decoder_layers: int = 9,
        dim: int = 256,
        num_attention_heads: int = 8,
        feedforward_dim: int = 1024,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        **query: Any,
    ):
        """
        Args:
            in_channels: of the feature map.
            class_weight, query: see `QueryHead`.
            mask_weight, dice_weight: of the losses, and of the matching's costs.
            num_points: where a mask is compared.
            oversample_ratio: candidates a point; the most uncertain of them make `importance_ratio` of the points.

        Raises:
            ConfigError: if a width is not a multiple of what it is divided into, a number is out of range, or there is
                no such class loss.
        """
        super().__init__(class_weight=class_weight, **query)
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
            raise ConfigError(
                f"NUM_POINTS {num_points}, OVERSAMPLE_RATIO {oversample_ratio}, IMPORTANCE_RATIO {importance_ratio}: "
                "the first two must be at least 1, the last between 0 and 1"
            )
        self.mask_weight, self.dice_weight = mask_weight, dice_weight
        self.num_points = num_points
        self.num_candidates = int(oversample_ratio * num_points)
        self.num_important = int(importance_ratio * num_points)

        self.pixel_decoder = PixelDecoder(
            in_channels=in_channels,
            dim=dim,
            num_layers=encoder_layers,
            num_heads=num_attention_heads,
            feedforward_dim=encoder_feedforward_dim,
        )
        self.predictor = MaskDecoder(
            dim=dim,
            num_classes=self.labels.num_classes,
            num_queries=self.num_queries,
            num_layers=decoder_layers,
            num_heads=num_attention_heads,
            feedforward_dim=feedforward_dim,
        )
        self.classification.initialize(self.predictor.class_embed)

    @classmethod
    def from_config(cls, cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.VISFT[name.upper()]
        return cls.common_config(cfg, name, input_shape) | {
            "encoder_feedforward_dim": node.ENCODER_FEEDFORWARD_DIM,
            "dim": node.DIM,
            "mask_weight": node.MASK_WEIGHT,
            "dice_weight": node.DICE_WEIGHT,
            "num_points": node.NUM_POINTS,
            "oversample_ratio": node.OVERSAMPLE_RATIO,
            "importance_ratio": node.IMPORTANCE_RATIO,
        }

    def forward(self, features: Tensor) -> MaskOutput:
        """Features [N, C, h, w] -> predictions before the first layer and after each."""
        features = features.to(self.pixel_decoder.mask_features.weight.dtype)
        return self.predictor(*self.pixel_decoder(features))

    def predictions(self, inputs: HeadInputs) -> MaskOutput:
        return self(inputs.features)

    def targets(self, inputs: HeadInputs) -> MaskTargets:
        images, device = inputs.images, inputs.features.device
        points = self._random_points(images, device)
        return MaskTargets(
            labels=pad_sequence(self.target_labels(images, device), batch_first=True),
            samples=[
                _sample_targets(image, at, inputs.padded_size)
                for image, at in zip(images, points, strict=True)
            ],
            points=points,
        )

    def inference(self, inputs: HeadInputs) -> list[Instances]:
        output, results = self(inputs.features), []
        best = zip(*self.best(output.logits[-1]), strict=True)
        for (scores, queries, classes), masks, size, original in zip(
            best, output.masks[-1], inputs.image_sizes, inputs.original_sizes, strict=True
        ):
            found, kept, quality = _found_masks(masks, queries, size, inputs.padded_size, original)
            found.scores, found.pred_classes = scores[kept] * quality, classes[kept]
            results.append(found)
        return results

    def proposals(self, inputs: HeadInputs) -> list[Instances]:
        """Each query's mask, whatever its class: `pred_masks`, `pred_boxes` and `objectness`, in the queries' order
        without those whose mask is empty. Like a score, objectness has the mask's quality as a factor.

        Coordinates are those of `inference`.
        """
        output, results = self(inputs.features), []
        queries = torch.arange(self.num_queries, device=inputs.features.device)
        for objectness, masks, size, original in zip(
            self.objectness(output.logits[-1]),
            output.masks[-1],
            inputs.image_sizes,
            inputs.original_sizes,
            strict=True,
        ):
            found, kept, quality = _found_masks(masks, queries, size, inputs.padded_size, original)
            found.objectness = objectness[kept] * quality
            results.append(found)
        return results

    @torch.no_grad()
    @without_autocast
    def match(self, output: MaskOutput, targets: MaskTargets) -> Matching:
        class_costs, p = self.classification.costs(output.logits), self.num_points
        costs = []
        for i, (sampled, at) in enumerate(zip(targets.samples, targets.points, strict=True)):
            target_labels = targets.labels[i, : len(sampled)]
            logits = sample_points(output.masks[:, i].flatten(0, 1)[None].float(), at[None, :p])
            logits = logits.view(*output.masks.shape[:1], self.num_queries, p)
            mask, dice = pairwise_mask_costs(logits, sampled[:, :p])
            cost = self.mask_weight * mask + self.dice_weight * dice
            costs.append(cost + self.class_weight * class_costs[:, i][..., target_labels])
        return match(costs)

    def pair_losses(self, output: MaskOutput, targets: MaskTargets, matching: Matching) -> dict[str, Tensor]:
        matched = output.masks[matching.predictions].float()  # [L, M, h, w]
        mask, dice, start = [], [], 0
        parts = zip(targets.samples, targets.points, matched.split(matching.counts, dim=1), strict=True)
        for sampled, at, masks in parts:
            target = matching.target[:, start : start + masks.shape[1]]
            start += masks.shape[1]
            if target.numel():
                found = self._point_losses(masks, sampled, target, at[self.num_points :])
                mask.append(found[0])
                dice.append(found[1])
        if mask:
            mask, dice = (torch.cat(values, dim=1).sum(1) for values in (mask, dice))
        else:
            mask = dice = matched.sum((1, 2, 3))
        return {"loss_mask": self.mask_weight * mask, "loss_dice": self.dice_weight * dice}

    def _point_losses(
        self, masks: Tensor, sampled: Tensor, target: Tensor, points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`mask_loss` and `dice_loss` of an image's masks [L, m, h, w], each at the points that count for it -> [L, m].

        Args:
            sampled: [T, P] all targets at all points. target: [L, m] the target of each mask.
            points: [C + R, 2], the last of the P: candidates, then random points.
        """
        first, parts = sampled.shape[1] - len(points), []
        chunks = [
            rows.split(rows_at_once(self.num_points, masks.device))
            for rows in (masks.flatten(0, 1), target.flatten())
        ]
        for rows, which in zip(*chunks, strict=True):
            chosen = self._choose(rows.detach(), points)

            def compute(rows: Tensor, which: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
                logits = sample_points(rows[:, None], points[chosen])[:, 0]
                targets = sampled[which[:, None], chosen + first]
                return mask_loss(logits, targets), dice_loss(logits, targets)

            if len(chunks[0]) == 1:
                parts.append(compute(rows, which, chosen))
            else:  # computed again in the backward pass, whose inputs would take gigabytes
                parts.append(
                    checkpoint(compute, rows, which, chosen, use_reentrant=False, preserve_rng_state=False)
                )
        mask, dice = (torch.cat(losses).view(target.shape) for losses in zip(*parts, strict=True))
        return mask, dice

    @torch.no_grad()
    def _choose(self, masks: Tensor, points: Tensor) -> Tensor:
        """For each mask [R, h, w] the indices [R, num_points] of its most uncertain candidates, and random points."""
        candidates, important = points[None, : self.num_candidates], []
        for part in masks.split(rows_at_once(self.num_candidates, masks.device)):
            certainty = sample_points(part[None], candidates)[0].abs_()
            important.append(certainty.topk(self.num_important, largest=False, sorted=False).indices)
        others = torch.arange(self.num_candidates, len(points), device=masks.device)
        # In half the bytes of topk's indices.
        return torch.cat((torch.cat(important), others.expand(len(masks), -1)), dim=1).int()

    def _random_points(self, images: list[dict], device: torch.device) -> list[Tensor]:
        """Each image's points [P, 2], 0..1 over the padded image: for matching, candidates, random ones.

        All masks and layers share them, so that an annotated mask is sampled once; they differ in which candidates
        count.
        """
        count = self.num_points + self.num_candidates + self.num_points - self.num_important
        draw, points = shared_random.number(), []
        for index, image in enumerate(images):
            generator = shared_random.image_generator(draw, image, index, device=device)
            points.append(torch.rand(count, 2, generator=generator, device=device))
        return points


def _sample_targets(image: dict, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Annotated masks at points [P, 2] (0..1 over the padded image) -> [T, P]; padding is outside of every mask."""
    if not num_targets(image):
        return points.new_zeros((0, len(points)))
    masks, size = image["instances"].gt_masks, image["instances"].image_size
    sampled = points.new_empty(len(masks), len(points))
    for into in sampled.split(_CHUNK):
        part, masks = bit_masks(masks[: len(into)], size), masks[len(into) :]
        (height, width), (padded_height, padded_width) = part.shape[-2:], padded_size
        scale = points.new_tensor([padded_width / width, padded_height / height])
        into.copy_(sample_masks(part.to(points.device), points * scale))
    return sampled


def _found_masks(
    masks: Tensor,
    queries: Tensor,
    image_size: tuple[int, int],
    padded_size: tuple[int, int],
    size: tuple[int, int],
) -> tuple[Instances, Tensor, Tensor]:
    """Masks of chosen queries at the image's original size, without the empty ones.

    Args:
        masks: [Q, h, w] logits. queries: [K], with repetitions.
        image_size, padded_size, size: (height, width) of the image before padding, after it, before it was resized.

    Returns:
        `pred_masks` and `pred_boxes` of K' <= K; which of the K these are, [K] bool; their quality [K'], the mean
        probability of a mask's foreground.
    """
    used, which = queries.unique(return_inverse=True)
    binary, quality = [], []
    # Few at a time: a hundred float masks of a large image take gigabytes.
    for chunk in masks[used].float().split(16):
        chunk = F.interpolate(chunk[None], padded_size, mode="bilinear", align_corners=False)
        chunk = chunk[..., : image_size[0], : image_size[1]]
        if size != tuple(image_size):
            chunk = F.interpolate(chunk, size, mode="bilinear", align_corners=False)
        foreground = chunk[0] > 0
        binary.append(foreground)
        area = foreground.sum((1, 2)).clamp(min=1)
        quality.append((chunk[0].sigmoid() * foreground).sum((1, 2)) / area)
    binary, quality = torch.cat(binary), torch.cat(quality)
    kept = binary.flatten(1).any(1)[which]
    found = Instances(size, pred_masks=binary, pred_boxes=Boxes(tight_boxes(binary)))
    return found[which[kept]], kept, quality[which[kept]]


def tight_boxes(masks: Tensor) -> Tensor:
    """Corner boxes [T, 4] around bool masks [T, H, W], their last pixels included; zeros for an empty mask.

    BitMasks.get_bounding_boxes waits for the device once for every mask.
    """
    rows, columns = masks.any(2), masks.any(1)
    edges = []
    for occupied in (columns, rows):
        first = occupied.int().argmax(1)
        last = occupied.shape[1] - occupied.flip(1).int().argmax(1)
        edges.append((first, torch.where(occupied.any(1), last, 0)))
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), dim=1).float()
