"""How likely a query is an object at all, whatever its class."""

from torch import Tensor

from visft.modeling.heads.common.classification import Classification
from visft.modeling.heads.common.label_space import LabelSpace


def objectness(classification: Classification, labels: LabelSpace, logits: Tensor) -> Tensor:
    """`[..., Q]` in 0..1, at least the probability of any class.

    Of a softmax it is what the class no-object leaves, of sigmoids the probability of the likeliest class.

    Args:
        logits: `[..., Q, classes + 1]`, no-object last.
    """
    probabilities = classification.probabilities(logits)
    if classification.pairs:
        return labels.decode(probabilities).max(-1).values
    return 1 - probabilities[..., -1]
