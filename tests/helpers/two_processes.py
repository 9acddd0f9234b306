"""Two processes that train on their own batches, and one that trains on both: their losses and gradients."""

from collections.abc import Callable
from pathlib import Path

import processes
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visft.checkpoint.shards import is_piece
from visft.engine.optimizer import average_gradients
from visft.modeling.backbone import sharding

WORLD = 2
WAYS = ("ddp", "ours", "fsdp2")
"""By DistributedDataParallel, by our own averaging, and with the tower in pieces."""

Gradients = dict[str, torch.Tensor | None]
Step = tuple[dict[str, float], Gradients]
Builds = dict[str, Callable[[], nn.Module]]
Batches = dict[str, list[list[dict]]]
"""Of each process."""


def step(model: nn.Module, images: list[dict]) -> Step:
    """The losses of one step in `model`, and the gradients of what trains. All processes draw from the same seed."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    losses = model(images)
    sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}, gradients(model)


def gradients(model: nn.Module) -> Gradients:
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if g is not None and is_piece(g) else g for name, g in trained.items()}


def alone(builds: Builds, batches: Batches) -> dict[tuple[str, str], Step]:
    """What one process finds in the joined batches, by build and batch."""
    found = {}
    for kind, build in builds.items():
        model = build()
        for name, parts in batches.items():
            found[kind, name] = step(model, sum(parts, []))
    return found


def together(builds: Builds, batches: Batches, folder: Path) -> list[dict[tuple[str, str, str], Step]]:
    """What each of two real processes finds, by build, batch and way."""
    store = f"file://{folder}/store"  # no port that another process could take
    processes.call(_work, *((rank, store, str(folder), builds, batches) for rank in range(WORLD)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _work(rank: int, store: str, folder: str, builds: Builds, batches: Batches) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        found = {}
        for kind, build in builds.items():
            ours, pieces = build(), build()
            sharding.shard(pieces.backbone)
            # As detectron2's create_ddp_model makes it: without find_unused_parameters.
            ddp = DistributedDataParallel(build(), broadcast_buffers=False)
            for name, parts in batches.items():
                losses, _ = step(ddp, parts[rank])
                found[kind, name, "ddp"] = (losses, gradients(ddp.module))
                # detectron2's own averaging of the metrics must find the same names on every process.
                with EventStorage():
                    tensors = {key: torch.tensor(value) for key, value in losses.items()}
                    SimpleTrainer.write_metrics(tensors, 0.0, 0)
                for way, model in (("ours", ours), ("fsdp2", pieces)):
                    losses, _ = step(model, parts[rank])
                    average_gradients(p for p in model.parameters() if p.requires_grad)
                    found[kind, name, way] = (losses, gradients(model))
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def relative(found: Gradients, expected: Gradients) -> float:
    """Norm of the difference of two gradients over the norm of the second; None counts as zero."""
    assert list(found) == list(expected)
    difference = norm = 0.0
    for own, wanted in zip(found.values(), expected.values(), strict=True):
        if wanted is None:
            wanted = torch.zeros(()) if own is None else torch.zeros_like(own)
        own = torch.zeros_like(wanted) if own is None else own
        difference += float((own.double() - wanted.double()).square().sum())
        norm += float(wanted.double().square().sum())
    return (difference / norm if norm else difference) ** 0.5


def assert_mean_losses(found: list[dict[str, float]], expected: dict[str, float]) -> None:
    """The processes' losses have the mean of the joined batch's."""
    assert all(set(losses) == set(expected) for losses in found)
    for key, value in expected.items():
        mean = sum(losses[key] for losses in found) / len(found)
        assert abs(mean - value) <= max(1e-5 * abs(value), 1e-7), key
