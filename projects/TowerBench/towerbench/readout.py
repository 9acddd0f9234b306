"""Readouts on frozen features that are trained to convergence, so that they add no randomness of their own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

Readout = Callable[[torch.Tensor], torch.Tensor]
"""From features `[..., C]` to scores of the classes `[..., classes]`."""

L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the penalty that are tried; the best on a validation split is taken."""

HISTORY = 20
"""Steps that L-BFGS remembers. With five times as many it takes nearly as many steps, each of twice the time."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes in one thread: steps of microseconds spend their time waiting for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class LogisticRegression:
    """Multinomial logistic regression on features of unit length (multiplied by sqrt(D): unit variance a coordinate).

    Minimises the mean cross-entropy + l2 / 2 |W|^2 by L-BFGS until the gradient vanishes; the bias is free. The problem
    is convex, so the result depends on nothing but the data.

    Args:
        features: `[N, D]`. labels: `[N]` int64 in 0..classes - 1.
        weights: `(W [classes, D], b [classes])` to start from; None: zeros.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        classes: int,
        l2: float,
        weights: tuple[torch.Tensor, torch.Tensor] | None = None,
        iterations: int = 200,
    ) -> None:
        x = self._scaled(features)
        w = (weights[0] if weights else torch.zeros(classes, x.shape[1])).clone().requires_grad_(True)
        b = (weights[1] if weights else torch.zeros(classes)).clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [w, b],
            max_iter=iterations,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, w, b), labels) + l2 / 2 * w.square().sum()
            loss.backward()
            return loss

        with one_thread():
            optimizer.step(closure)
        self.weights = (w.detach(), b.detach())

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """`[N, D]` -> `[N, classes]`."""
        return F.linear(self._scaled(features), *self.weights)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """`[N, D]` -> `[N]`."""
        return self.logits(features).argmax(1)

    @staticmethod
    def _scaled(features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.float(), dim=-1) * features.shape[1] ** 0.5


def chosen_on_validation(
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    strengths: Sequence[float] = L2,
) -> LogisticRegression:
    """The regression whose penalty does best on the validation split; of equals the strongest.

    Args:
        train, validation: features `[N, D]` and labels `[N]`.
    """
    best, accuracy, weights = None, -1.0, None
    for l2 in sorted(strengths, reverse=True):
        # Each starts from the stronger one's end: the same optimum in fewer steps.
        model = LogisticRegression(*train, classes, l2, weights)
        weights = model.weights
        found = (model.predict(validation[0]) == validation[1]).float().mean().item()
        if found > accuracy:
            best, accuracy = model, found
    return best
