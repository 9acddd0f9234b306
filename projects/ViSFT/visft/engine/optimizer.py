"""Optimizer and learning-rate schedule of a stage."""

import math
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from torch import nn

from visft.checkpoint.shards import is_piece, local
from visft.modeling.backbone import lr_factor


def build_optimizer(
    model: nn.Module, solver: CfgNode, *, layer_decay: float = 1.0, heads: CfgNode | None = None
) -> torch.optim.AdamW:
    """Build AdamW (eps 1e-8) for the trained parameters of `model`, all with the same weight decay as in the paper.

    Args:
        model: its parameters with `requires_grad` are used, in the order of `named_parameters`.
        solver: a node of `VISFT.SOLVER`.
        layer_decay: MODEL.CLIP_VIT.LAYER_DECAY (see `visft.modeling.backbone.lr_factor`).
        heads: the node with BASE_LR and WEIGHT_DECAY for the parameters of `model.heads`. None: `solver`.

    Returns:
        The optimizer, with one group per pair of rate and weight decay. A rate other than BASE_LR is the group's
        `lr_scale` times BASE_LR.
    """
    factor = lr_factor(model, layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = heads if heads is not None and name.startswith("heads.") else solver
            scale = factor(name) * (1.0 if own is solver else own.BASE_LR / solver.BASE_LR)
            groups.setdefault((scale, own.WEIGHT_DECAY), []).append(parameter)
    kinds = {is_piece(parameter) for parameters in groups.values() for parameter in parameters}
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": scale * solver.BASE_LR}
            | ({} if scale == 1 else {"lr_scale": scale})
            for (scale, decay), parameters in groups.items()
        ],
        eps=1e-8,
        # One call for many parameters takes no whole ones beside pieces.
        foreach=False if len(kinds) > 1 else None,
    )


def learning_rate(iteration: int, *, base: float, warmup: int, total: int) -> float:
    """Return the learning rate of an iteration (from 0): linear warmup, then a half cosine to 0 at `total`.

    It depends only on the iteration, so a resumed run needs no scheduler state. The cosine is eq. 5 of Loshchilov &
    Hutter, "SGDR", without restarts, counted from iteration 0 as in detectron2's WarmupCosineLR.
    """
    factor = 0.5 * (1 + math.cos(math.pi * iteration / total))
    if iteration < warmup:
        factor *= (iteration + 1) / warmup
    return base * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every group to `value`, times its `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def average_gradients(parameters: Iterable[nn.Parameter], bucket: int = 1 << 23) -> None:
    """Replace gradients by their mean over all processes. A single process changes nothing.

    A missing gradient counts as zero if another process has it. A parameter without a gradient in any process keeps
    none, so a head without labels stays unchanged, as in one process with the joined batch. Call this once per step,
    after the accumulated batches. Gradients in pieces have been averaged already, in the backward pass.

    Args:
        parameters: the same parameters in the same order on every process.
        bucket: approximate number of elements to send at a time.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    parameters = [parameter for parameter in parameters if not is_piece(parameter)]
    if not parameters:
        return
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


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor | None:
    """Scale the gradients so that their joint L2 norm is at most `limit`.

    Args:
        parameters: whole ones and pieces (see `sharding`); all processes give the same.
        limit: infinity: nothing is scaled.

    Returns:
        The norm before, or None if no parameter has a gradient.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return None
    if not any(map(is_piece, parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    squares = torch.zeros(2, device=parameters[0].device)  # of pieces, of whole gradients
    for parameter in parameters:
        squares[0 if is_piece(parameter) else 1] += torch.linalg.vector_norm(local(parameter.grad)) ** 2
    torch.distributed.all_reduce(squares[:1])
    norm = squares.sum().sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        local(parameter.grad).mul_(factor)
    return norm


def _mean_over_processes(tensors: list[torch.Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
