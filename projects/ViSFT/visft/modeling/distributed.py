"""What the processes of a run exchange in a forward pass, so that together they train as one with the joined batch."""

from collections.abc import Iterable, Mapping

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def means_over_processes(counts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The mean over processes of vectors that each of them has, by one reduction.

    In double precision: counts are exact, sums of class weights nearly so.
    """
    if not counts:
        return {}
    flat = torch.cat([count.double() for count in counts.values()])
    if comm.get_world_size() > 1:
        flat = flat.to(device)
        torch.distributed.all_reduce(flat)
        flat /= comm.get_world_size()
    return dict(zip(counts, flat.split([len(count) for count in counts.values()]), strict=True))


def with_all_names(losses: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Losses, with a zero for each that only other processes have: detectron2's trainer averages rank 0's by name."""
    names = dict.fromkeys(name for part in comm.all_gather(list(losses)) for name in part)
    return {name: losses.get(name, torch.zeros((), device=device, requires_grad=True)) for name in names}


def add_zero(losses: dict[str, Tensor], zero: Tensor) -> None:
    """Add a zero to the first loss, so that the backward pass runs through what the zero depends on."""
    first = next(iter(losses))
    losses[first] = losses[first] + zero


def zero_for(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """A zero that requires grad; under DistributedDataParallel its backward pass gives each parameter a zero gradient.

    DistributedDataParallel without `find_unused_parameters` waits for the gradient of every parameter, and reduces
    gradients as soon as they are there. A function that communicates in its backward pass has to run before: give it
    this zero as its input.

    Args:
        parameters: those that do not train are passed over.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if trained and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return _ZeroGradient.apply(*trained)
    return torch.zeros((), device=device, requires_grad=True)


class _ZeroGradient(torch.autograd.Function):
    """Zero, with a zero gradient for each parameter given; no arithmetic on them."""

    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((), dtype=t, device=d).expand(shape) for shape, t, d in ctx.like)


def row_counts(count: int, device: torch.device) -> list[int]:
    """How many rows each process has, by rank."""
    if comm.get_world_size() == 1:
        return [count]  # without waiting for the device
    counts = torch.zeros(comm.get_world_size(), dtype=torch.int64, device=device)
    counts[comm.get_rank()] = count
    torch.distributed.all_reduce(counts)
    return counts.tolist()


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """`rows` `[n, ...]` of every process under one another, by rank.

    The gradient of a row is the sum of what all processes send into it. As losses and gradients are averaged over
    processes, that is the gradient of one process with all rows. Where `rows` requires grad, it has to in every process
    (an empty leaf will do), and every process has to run its backward pass.

    Args:
        counts: of `row_counts`, the same in all processes.
    """
    if len(counts) == 1:
        return rows
    padded = torch.cat((rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])))
    parts = _Gather.apply(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded: Tensor) -> Tensor:
        parts = [torch.empty_like(padded) for _ in range(comm.get_world_size())]
        torch.distributed.all_gather(parts, padded.contiguous())
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total[comm.get_rank()]
