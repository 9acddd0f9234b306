"""Optimizer and learning-rate schedule of a stage."""

import math
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from torch import nn

from visft.modeling.backbone import lr_factor


def build_optimizer(
    model: nn.Module, solver: CfgNode, *, layer_decay: float = 1.0, heads: CfgNode | None = None
) -> torch.optim.AdamW:
    """AdamW (eps 1e-8) over the parameters of `model` that train, all with the same weight decay, as the paper's.

    Args:
        model: parameters with `requires_grad` are taken, in the order of `named_parameters`.
        solver: a node of `VISFT.SOLVER`.
        layer_decay: MODEL.CLIP_VIT.LAYER_DECAY (see `visft.modeling.backbone.lr_factor`).
        heads: the node whose BASE_LR and WEIGHT_DECAY the parameters of `model.heads` have; None: `solver`.

    Returns:
        One group for each pair of a rate and a weight decay; a rate other than BASE_LR is its `lr_scale` times that.
    """
    factor = lr_factor(model, layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = heads if heads is not None and name.startswith("heads.") else solver
            scale = factor(name) * (1.0 if own is solver else own.BASE_LR / solver.BASE_LR)
            groups.setdefault((scale, own.WEIGHT_DECAY), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": scale * solver.BASE_LR}
            | ({} if scale == 1 else {"lr_scale": scale})
            for (scale, decay), parameters in groups.items()
        ],
        eps=1e-8,
    )


def learning_rate(iteration: int, *, base: float, warmup: int, total: int) -> float:
    """Learning rate of an iteration (from 0): linear warm-up, then a half cosine to 0 at `total`.

    It depends on the iteration alone, so that a resumed run needs no scheduler state. Cosine: Loshchilov & Hutter,
    "SGDR", eq. 5 without restarts, counted from iteration 0, as detectron2's WarmupCosineLR does.
    """
    factor = 0.5 * (1 + math.cos(math.pi * iteration / total))
    if iteration < warmup:
        factor *= (iteration + 1) / warmup
    return base * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every group, times the group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def average_gradients(parameters: Iterable[nn.Parameter], bucket: int = 1 << 23) -> None:
    """Replace gradients by their mean over all processes (nothing happens in a single one).

    A parameter that some process has no gradient for counts as zero there, one that none has keeps none: a head
    without labels anywhere is left alone, exactly as in one process with the joined batch. Done once a step, also
    when batches are accumulated.

    Args:
        parameters: the same parameters in the same order on every process.
        bucket: gradients are sent in pieces of about so many numbers.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    parameters = list(parameters)
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(present)
    pieces: list[torch.Tensor] = []
    size = 0
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        pieces.append(parameter.grad)
        size += parameter.grad.numel()
        if size >= bucket:
            _mean_over_processes(pieces)
            pieces, size = [], 0
    _mean_over_processes(pieces)


def _mean_over_processes(tensors: list[torch.Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
