"""Detection by DETR (arXiv 2005.12872)."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from visft.errors import ConfigError
from visft.modeling.heads.base import HeadInputs, num_targets
from visft.modeling.heads.build import VISFT_HEADS_REGISTRY
from visft.modeling.heads.common.full_precision import without_autocast
from visft.modeling.heads.common.layers import MLP, check_divisible
from visft.modeling.heads.common.losses import generalized_iou
from visft.modeling.heads.common.matcher import Matching, match
from visft.modeling.heads.common.position_encoding import sine_position_encoding
from visft.modeling.heads.common.query_head import QueryHead
from visft.modeling.heads.detr.detr_transformer import DETRTransformer


@dataclass(frozen=True)
class DETROutput:
    """Predictions of all decoder layers, the last one last."""

    hidden_states: Tensor
    """[layers, N, Q, D]"""
    logits: Tensor
    """[layers, N, Q, classes + 1], no-object last"""
    boxes: Tensor
    """[layers, N, Q, 4]: cxcywh, 0..1 over the unpadded image"""


@dataclass(frozen=True)
class DETRTargets:
    """Labels [N, T] and boxes [N, T, 4] (cxcywh, relative), padded to the most targets of an image; their numbers."""

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]


@VISFT_HEADS_REGISTRY.register()
class DETRHead(QueryHead):
    """Boxes from learned queries, trained by matching them one to one with the annotated boxes.

    Boxes are relative to the unpadded image and padding is masked, so an image's result does not depend on the
    others of its batch.
    """

    class_layers = ("class_embeds",)
    label_fields = ("gt_boxes",)

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        encoder_layers: int = 6,
        encoder_dim: int = 128,
        decoder_layers: int = 6,
        decoder_dim: int = 256,
        num_attention_heads: int = 8,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        nms_thresh: float = 1.0,
        **query: Any,
    ):
        """
        Args:
            in_channels: of the feature map.
            class_weight, query: see `QueryHead`.
            l1_weight, giou_weight: of the losses, and of the matching's costs.
            nms_thresh: inference leaves out a box whose IoU with a better one of its class is above this; 1: none. The
                matching teaches queries not to repeat each other, but slowly: a short training needs it.

        Raises:
            ConfigError: if a width is not a multiple of what it is divided into, there is no such class loss, or
                `nms_thresh` is not in 0..1.
        """
        super().__init__(class_weight=class_weight, **query)
        if not 0 <= nms_thresh <= 1:
            raise ConfigError(
                f"MODEL.VISFT.DETECTION.NMS_THRESH_TEST is {nms_thresh}; expected an IoU, 0 to 1 (1: leave none out)"
            )
        check_divisible("ENCODER_DIM", encoder_dim, 4, "sine and cosine of x and y")
        self.l1_weight, self.giou_weight, self.nms_thresh = l1_weight, giou_weight, nms_thresh

        self.input_proj = nn.Conv2d(in_channels, encoder_dim, 1)
        self.transformer = DETRTransformer(
            encoder_layers=encoder_layers,
            encoder_dim=encoder_dim,
            decoder_layers=decoder_layers,
            decoder_dim=decoder_dim,
            num_heads=num_attention_heads,
            feedforward_dim=feedforward_dim,
            dropout=dropout,
        )
        self.query_embeds = nn.Embedding(self.num_queries, decoder_dim)
        self.class_embeds = nn.Linear(decoder_dim, self.labels.num_classes + 1)
        self.bbox_embeds = MLP(decoder_dim, decoder_dim, 4, 3)
        self.classification.initialize(self.class_embeds)

    @classmethod
    def from_config(cls, cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.VISFT[name.upper()]
        return cls.common_config(cfg, name, input_shape) | {
            "encoder_dim": node.ENCODER_DIM,
            "decoder_dim": node.DECODER_DIM,
            "dropout": node.DROPOUT,
            "l1_weight": node.L1_WEIGHT,
            "giou_weight": node.GIOU_WEIGHT,
            "nms_thresh": node.NMS_THRESH_TEST,
        }

    def forward(self, features: Tensor, padding_mask: Tensor | None = None) -> DETROutput:
        """Features [N, C, h, w] and the padding mask [N, h, w] -> predictions of all layers."""
        return self._predict(self._hidden_states(features, padding_mask))

    def predictions(self, inputs: HeadInputs) -> DETROutput:
        return self(inputs.features, _padding_mask(inputs))

    def targets(self, inputs: HeadInputs) -> DETRTargets:
        device = inputs.features.device
        labels, boxes = self.target_labels(inputs.images, device), []
        for image, (height, width) in zip(inputs.images, inputs.image_sizes, strict=True):
            corners = torch.zeros(0, 4, device=device)
            if num_targets(image):
                corners = image["instances"].gt_boxes.tensor.to(device).float()
            relative = corners / corners.new_tensor([width, height, width, height])
            boxes.append(box_convert(relative, "xyxy", "cxcywh"))
        return DETRTargets(
            labels=pad_sequence(labels, batch_first=True),
            boxes=pad_sequence(boxes, batch_first=True),
            counts=tuple(map(len, labels)),
        )

    def inference(self, inputs: HeadInputs) -> list[Instances]:
        output, results = self._last(inputs), []
        best = zip(*self.best(output.logits[0]), strict=True)
        for boxes, (scores, queries, classes), size in zip(
            output.boxes[0], best, inputs.original_sizes, strict=True
        ):
            found = _boxed(boxes[queries], size, scores=scores, pred_classes=classes)
            if self.nms_thresh < 1:
                found = found[batched_nms(found.pred_boxes.tensor, scores, classes, self.nms_thresh)]
            results.append(found)
        return results

    def proposals(self, inputs: HeadInputs) -> list[Instances]:
        """Each query's box, whatever its class: `pred_boxes` and `objectness`, in the queries' order.

        Coordinates are those of `inference`.
        """
        output = self._last(inputs)
        found = zip(output.boxes[0], inputs.original_sizes, self.objectness(output.logits[0]), strict=True)
        return [_boxed(boxes, size, objectness=objectness) for boxes, size, objectness in found]

    def _last(self, inputs: HeadInputs) -> DETROutput:
        """The last layer's predictions."""
        return self._predict(self._hidden_states(inputs.features, _padding_mask(inputs))[-1:])

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As DETR does: with a softmax each query under its best class alone."""
        if self.classification.pairs:
            return super().best(logits)
        scores, classes = self.class_probabilities(logits).max(-1)
        scores, queries = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        return scores, queries, classes.gather(1, queries)

    @torch.no_grad()
    @without_autocast
    def match(self, output: DETROutput, targets: DETRTargets) -> Matching:
        costs, boxes = self.classification.costs(output.logits), output.boxes.float()
        index = targets.labels[None, :, None].expand(*costs.shape[:3], -1)
        cost = self.class_weight * costs.gather(-1, index)
        cost += self.l1_weight * torch.cdist(boxes, targets.boxes[None], p=1)
        cost -= self.giou_weight * generalized_iou(
            _corners(boxes)[..., None, :], _corners(targets.boxes)[None, :, None]
        )
        return match([cost[:, i, :, :count] for i, count in enumerate(targets.counts)])

    def pair_losses(self, output: DETROutput, targets: DETRTargets, matching: Matching) -> dict[str, Tensor]:
        found, expected = output.boxes[matching.predictions].float(), targets.boxes[matching.targets]
        l1 = (found - expected).abs().sum((1, 2))
        giou = generalized_iou(_corners(found), _corners(expected))
        return {"loss_bbox": self.l1_weight * l1, "loss_giou": self.giou_weight * (1 - giou).sum(1)}

    def _hidden_states(self, features: Tensor, padding_mask: Tensor | None) -> Tensor:
        features = self.input_proj(features.to(self.input_proj.weight.dtype))
        valid = None if padding_mask is None else ~padding_mask
        everywhere = features.new_ones((1, *features.shape[-2:]), dtype=torch.bool)
        pos = sine_position_encoding(everywhere if valid is None else valid, features.shape[1])
        return self.transformer(
            features.flatten(2).transpose(1, 2),
            pos.to(features.dtype).flatten(2).transpose(1, 2),
            self.query_embeds.weight,
            None if valid is None else valid.flatten(1),
        )

    def _predict(self, hidden: Tensor) -> DETROutput:
        return DETROutput(hidden, self.class_embeds(hidden), self.bbox_embeds(hidden).float().sigmoid())


def _corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def _boxed(boxes: Tensor, size: tuple[int, int], **fields: Tensor) -> Instances:
    """Instances with relative boxes [K, 4] (cxcywh) in pixels of an image of (height, width), clipped to it."""
    height, width = size
    corners = _corners(boxes.float())
    found = Boxes(corners * corners.new_tensor([width, height, width, height]))
    found.clip(size)
    return Instances(size, pred_boxes=found, **fields)


def _padding_mask(inputs: HeadInputs) -> Tensor | None:
    """The padding mask, or None where no image is padded (attention without a mask is faster)."""
    padded = any(tuple(size) != tuple(inputs.padded_size) for size in inputs.image_sizes)
    return inputs.padding_mask if padded else None
