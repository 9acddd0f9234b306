"""What DETR and Mask2Former share: learned queries, each matched with at most one annotated object."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor

from visft.modeling.heads.base import HeadInputs, VisftHead, nonzero_count, num_targets
from visft.modeling.heads.common.classification import best_pairs, build_classification, class_weight_sum
from visft.modeling.heads.common.federated import Federated, build_federated
from visft.modeling.heads.common.full_precision import without_autocast
from visft.modeling.heads.common.label_space import LabelSpace, label_space
from visft.modeling.heads.common.matcher import Matching


class QueryHead(VisftHead):
    """A head with learned queries. Logits are `[..., Q, classes + 1]`, no-object last.

    A subclass says what it predicts, what it learns from, how both are matched, and its losses of matched pairs
    (`predictions`, `targets`, `match`, `pair_losses`).
    """

    def __init__(
        self,
        *,
        labels: LabelSpace,
        num_queries: int = 100,
        no_object_weight: float = 0.1,
        class_weight: float = 1.0,
        class_loss: str = "softmax",
        federated: Federated | None = None,
        max_detections: int = 100,
    ) -> None:
        """
        Args:
            labels: what the class outputs mean.
            no_object_weight: of unmatched queries in the classification loss.
            class_weight: of the classification loss, and of its cost in the matching.
            class_loss: `softmax`, or `sigmoid` (then `no_object_weight` is not used).
            federated: which classes take part in the class loss; None: all.
            max_detections: how many detections of an image inference returns at most.

        Raises:
            ConfigError: there is no such class loss.
        """
        super().__init__()
        self.labels, self.num_queries = labels, num_queries
        self.no_object_weight, self.class_weight = no_object_weight, class_weight
        self.classification = build_classification(class_loss, no_object_weight)
        self.federated, self.max_detections = federated, max_detections

    @staticmethod
    def common_config(cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments that both heads read alike from their node `MODEL.VISFT.<NAME>`.

        Raises:
            ConfigError: the classes or their frequencies are not known (see `label_space`, `build_federated`).
        """
        node, labels = cfg.MODEL.VISFT[name.upper()], label_space(cfg, name)
        return {
            "in_channels": input_shape.channels,
            "labels": labels,
            "num_queries": node.NUM_QUERIES,
            "encoder_layers": node.ENCODER_LAYERS,
            "decoder_layers": node.DECODER_LAYERS,
            "num_attention_heads": node.NUM_ATTENTION_HEADS,
            "feedforward_dim": node.FEEDFORWARD_DIM,
            "no_object_weight": node.NO_OBJECT_WEIGHT,
            "class_weight": node.CLASS_WEIGHT,
            "class_loss": node.CLASS_LOSS,
            "federated": build_federated(cfg, name, labels),
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def normalizers(self, images: list[dict]) -> Tensor:
        """[2]: number of objects; sum of the class weights of all queries. A federated loss adds [outputs + 1]: whether
        each class is annotated."""
        self.labels.check(images)
        counts = [num_targets(image) for image in images]
        sums = torch.tensor([sum(counts), class_weight_sum(counts, self.num_queries, self.no_object_weight)])
        if self.federated is None:
            return sums
        return torch.cat((sums, self.federated.present(images, self.labels)))

    def losses(self, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
        # Drawn first: dropout draws from the same generator as often as this process has images.
        chosen = None if self.federated is None else self.federated.draw(normalizers[2:])
        output = self.predictions(inputs)
        if chosen is not None:
            output = replace(output, logits=Federated.leave_out(output.logits, chosen))
        targets = self.targets(inputs)
        return self.criterion(output, targets, self.match(output, targets), normalizers)

    @without_autocast
    def criterion(
        self, output: Any, targets: Any, matching: Matching, normalizers: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses of all layers: `loss_ce` and the pairs', auxiliary ones as `loss_ce_0`..."""
        pairs = self.pair_losses(output, targets, matching)
        num_objects, class_weights = nonzero_count(normalizers[:2].to(output.logits.device)).unbind()
        ce = self.classification.losses(output.logits, targets.labels, matching)
        ce = self.class_weight * ce / self.classification.divisor(num_objects, class_weights)
        return by_layer({"loss_ce": ce} | {name: loss / num_objects for name, loss in pairs.items()})

    def predictions(self, inputs: HeadInputs) -> Any:
        """Predictions of all layers, the last one last: `logits` `[layers, N, Q, classes + 1]` and more."""
        raise NotImplementedError

    def targets(self, inputs: HeadInputs) -> Any:
        """What the annotations say: `labels` `[N, T]`, padded to the most targets of an image, and more."""
        raise NotImplementedError

    def match(self, output: Any, targets: Any) -> Matching:
        """Assign targets to queries, in every layer anew."""
        raise NotImplementedError

    def pair_losses(self, output: Any, targets: Any, matching: Matching) -> dict[str, Tensor]:
        """Weighted losses `[layers]`, by name: their sums over matched pairs."""
        raise NotImplementedError

    def target_labels(self, images: list[dict], device: torch.device) -> list[Tensor]:
        """Of each image the class outputs `[T]` of its objects."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return [
            self.labels.encode(image["instances"].gt_classes).to(device) if num_targets(image) else none
            for image in images
        ]

    def class_probabilities(self, logits: Tensor) -> Tensor:
        """`[..., Q, K]` of the data set's classes."""
        return self.labels.decode(self.classification.probabilities(logits))

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, queries and classes `[N, K]` of the best pairs of a query and a class.

        Args:
            logits: `[N, Q, classes + 1]`.
        """
        return best_pairs(self.class_probabilities(logits), self.max_detections)

    def objectness(self, logits: Tensor) -> Tensor:
        """`[..., Q]` in 0..1: how likely a query is an object, whatever its class; at least any class's probability.

        Of a softmax it is what the class no-object leaves, of sigmoids the probability of the likeliest class.
        """
        if self.classification.pairs:
            return self.class_probabilities(logits).max(-1).values
        return 1 - self.classification.probabilities(logits)[..., -1]


def by_layer(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses `[layers]` as scalars: the last layer's under its name, auxiliary ones as `name_0`, `name_1`, ..."""
    scalars = {}
    for name, values in losses.items():
        *auxiliary, last = values.unbind()
        scalars |= {f"{name}_{i}": value for i, value in enumerate(auxiliary)} | {name: last}
    return scalars
