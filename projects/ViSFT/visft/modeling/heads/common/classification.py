"""What class scores of queries mean: a softmax over the classes and no-object, or a sigmoid for each class."""

import math

import torch
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F

from visft.errors import ConfigError
from visft.modeling.heads.common.matcher import Matching

CLASS_LOSSES = ("softmax", "sigmoid")
"""Values of CLASS_LOSS."""


class SoftmaxClassification:
    """DETR's: weighted cross-entropy, unmatched queries being of the class no-object.

    Logits are [L, N, Q, classes + 1], of L predictions (the last layer's and the auxiliary ones), no-object last.

    Attributes:
        pairs: whether inference takes the best pairs of a query and a class, not each query's best class.
    """

    pairs = False

    def __init__(self, no_object_weight: float = 0.1):
        self.no_object_weight = no_object_weight

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, in the shape of the logits."""
        return logits.float().softmax(-1)

    def costs(self, logits: Tensor) -> Tensor:
        """Cost of matching a query with a target of each class, in the shape of the logits."""
        return -self.probabilities(logits)

    def losses(self, logits: Tensor, labels: Tensor, matching: Matching) -> Tensor:
        """[L] losses summed over queries and images. labels: [N, T] of the targets."""
        target = _target_classes(logits, labels, matching)
        ce = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), reduction="none")
        ce = ce.view_as(target)
        no_object = logits.shape[-1] - 1
        return torch.where(target == no_object, self.no_object_weight * ce, ce).sum((1, 2))

    def divisor(self, num_targets: Tensor, class_weights: Tensor) -> Tensor:
        """What the losses are divided by: the number of targets, or the sum of the class weights of all queries."""
        return class_weights

    def initialize(self, layer: nn.Linear) -> None:
        """Set what the class layer of a fresh head starts from."""


class SigmoidClassification:
    """Deformable DETR's (arXiv 2010.04159): focal loss of each class on its own; the no-object output is not used.

    Methods are those of `SoftmaxClassification`.
    """

    pairs = True
    alpha, gamma = 0.25, 2.0

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def costs(self, logits: Tensor) -> Tensor:
        """The focal loss as a target of the class, less that as none of it."""
        p = self.probabilities(logits)
        as_target = -self.alpha * (1 - p) ** self.gamma * (p + 1e-8).log()
        as_none = -(1 - self.alpha) * p**self.gamma * (1 - p + 1e-8).log()
        return as_target - as_none

    def losses(self, logits: Tensor, labels: Tensor, matching: Matching) -> Tensor:
        target = F.one_hot(_target_classes(logits, labels, matching), logits.shape[-1])
        logits, target = logits[..., :-1].float(), target[..., :-1].float()
        return sigmoid_focal_loss(logits, target, self.alpha, self.gamma).sum((1, 2, 3))

    def divisor(self, num_targets: Tensor, class_weights: Tensor) -> Tensor:
        return num_targets

    def initialize(self, layer: nn.Linear) -> None:
        """Each class starts at a probability of 0.01 (arXiv 1708.02002, section 3.3): nearly all pairs are negative."""
        nn.init.constant_(layer.bias, -math.log(99))


def build_classification(kind: str, no_object_weight: float) -> SoftmaxClassification | SigmoidClassification:
    """By the value of CLASS_LOSS.

    Raises:
        ConfigError: another value.
    """
    if kind == "softmax":
        return SoftmaxClassification(no_object_weight)
    if kind == "sigmoid":
        return SigmoidClassification()
    raise ConfigError(f"CLASS_LOSS is `{kind}`; expected {' or '.join(CLASS_LOSSES)}")


def class_weight_sum(counts: list[int], num_queries: int, no_object_weight: float) -> float:
    """Sum of the class weights of all queries, given each image's number of targets."""
    matched = sum(min(count, num_queries) for count in counts)
    return matched + no_object_weight * (num_queries * len(counts) - matched)


def best_pairs(probability: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [N, Q, classes] -> scores, queries and classes [N, K] of the best pairs of a query and a class."""
    num_classes = probability.shape[-1]
    scores, index = probability.flatten(1).topk(min(count, probability[0].numel()), dim=1)
    return scores, index // num_classes, index % num_classes


def _target_classes(logits: Tensor, labels: Tensor, matching: Matching) -> Tensor:
    """[L, N, Q]: each query's class; no-object where it is not matched."""
    target = torch.full(logits.shape[:3], logits.shape[-1] - 1, device=logits.device)
    target[matching.predictions] = labels[matching.targets]
    return target
