"""The optimizer of the pretraining: orthogonalised updates of the hidden matrices (Muon), and Adam for the rest."""

import math

import torch
from torch import nn

from demoworld.schedule import Settings


def _orthogonalised(g: torch.Tensor) -> torch.Tensor:
    """Return roughly the nearest semi-orthogonal matrix to each of `[K, m, n]`, m <= n, by Muon's Newton-Schulz
    iteration."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + torch.baddbmm(-4.7750 * a, a, a, alpha=2.0315) @ x
    return x


class Optimizer:
    """Muon for the transformers' matrices, and AdamW for the rest. Its state is a dictionary of tensors.

    It computes in float32, because bfloat16, which `torch.optim.Muon` uses, is slow on CPUs. Fused projections are
    orthogonalised one by one.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.parameters = dict(model.named_parameters())
        self.matrices: dict[tuple[int, int], list[str]] = {}
        self.rest: list[str] = []
        for name, p in self.parameters.items():
            if ".resblocks." in name and p.ndim == 2:
                self.matrices.setdefault(tuple(p.shape), []).append(name)
            else:
                self.rest.append(name)
        muon = [name for names in self.matrices.values() for name in names]
        self.state = {f"momentum/{n}": torch.zeros_like(self.parameters[n]) for n in muon}
        for name in self.rest:
            self.state[f"mean/{name}"] = torch.zeros_like(self.parameters[name])
            self.state[f"square/{name}"] = torch.zeros_like(self.parameters[name])

    @torch.no_grad()
    def step(self, lr: float, step: int) -> None:
        """Make one update and clear the gradients. `step` counts from 0."""
        for shape, names in self.matrices.items():
            momenta = [self.state[f"momentum/{n}"] for n in names]
            gradients = [self.parameters[n].grad for n in names]
            torch._foreach_mul_(momenta, 0.95)
            torch._foreach_add_(momenta, gradients)
            update = torch.stack(torch._foreach_add(gradients, momenta, alpha=0.95))
            rows, columns = shape
            parts = 3 if rows == 3 * columns else 1  # q, k and v lie in one matrix
            update = update.view(-1, rows // parts, columns)
            tall = rows // parts > columns
            update = _orthogonalised(update.mT if tall else update)
            update = (update.mT if tall else update).reshape(len(names), rows, columns)
            # Updates are scaled to the root mean square of AdamW's, so that both share a learning rate.
            size = 0.2 * math.sqrt(max(rows // parts, columns))
            for name, u in zip(names, update, strict=True):
                self.parameters[name].mul_(1 - lr * self.settings.weight_decay).add_(u, alpha=-lr * size)
        means = [self.state[f"mean/{n}"] for n in self.rest]
        squares = [self.state[f"square/{n}"] for n in self.rest]
        gradients = [self.parameters[n].grad for n in self.rest]
        b1, b2 = 0.9, 0.98
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        denominators = torch._foreach_sqrt(torch._foreach_div(squares, 1 - b2 ** (step + 1)))
        torch._foreach_add_(denominators, 1e-8)
        parameters = [self.parameters[n] for n in self.rest]
        torch._foreach_addcdiv_(parameters, means, denominators, value=-lr / (1 - b1 ** (step + 1)))
        for p in self.parameters.values():
            p.grad = None
