"""Three steps by 1, 2 and 4 processes give the same losses, gradients and weights, though one process has no labels."""

import processes
import pytest
import torch
import torch.distributed as dist
from batches_of_processes import BOTH, BOXES, MASKS, build, picture
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch.nn.parallel import DistributedDataParallel

from visft.checkpoint import shards
from visft.engine.optimizer import build_optimizer
from visft.engine.trainer import StageTrainer
from visft.modeling.backbone import sharding

COUNTS, STEPS = (1, 2, 4), 3
# Of four images, one for each of four processes. The last process never has labels.
LABELS = ((2, BOTH), (1, BOXES), (3, MASKS), None)
STAGES, MIXINGS, WAYS = ("heads", "lora", "lora balanced"), ("joint", "ratio"), ("ours", "fsdp2", "ddp")
KINDS = [(s, m) for s in STAGES for m in MIXINGS if (s, m) != ("lora balanced", "ratio")]  # which is refused
LOGGED = ("total_loss", "grad_norm")  # the norm before clipping


def ways(stage: str, mixing: str) -> tuple[str, ...]:
    # DistributedDataParallel gives the head whose turn it is not a zero gradient, so that AdamW's momentum moves it.
    return WAYS[:2] if (stage, mixing) == ("heads", "ratio") else WAYS


class Notes(HookBase):
    """What the trainer logs, and the averaged and clipped gradient, of each step."""

    def __init__(self) -> None:
        self.losses, self.gradients = [], []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.losses.append({n: v for n, (v, _) in latest.items() if "/" in n or n in LOGGED})
        grads = [p.grad for p in self.trainer.parameters]
        self.gradients.append([None if g is None else whole(g).clone() for g in grads])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if shards.is_piece(tensor) else tensor


def batch(step: int, mixing: str, rank: int, world: int) -> list[dict]:
    task = {} if mixing == "joint" else {"task": ("detection", "segmentation")[step % 2]}
    images = [picture(spec, 10 * step + i) | task for i, spec in enumerate(LABELS)]
    return images[rank * len(images) // world : (rank + 1) * len(images) // world]


def train(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world
        )
    found = {}
    for stage, mixing in KINDS:
        for way in ways(stage, mixing) if world > 1 else WAYS[:1]:
            model = build(stage)
            if way == "fsdp2":
                sharding.shard(model.backbone)
            optimizer = build_optimizer(model, CfgNode({"BASE_LR": 1e-3, "WEIGHT_DECAY": 1e-4}))
            wrapped = DistributedDataParallel(model, broadcast_buffers=False) if way == "ddp" else model
            stream = iter([batch(step, mixing, rank, world) for step in range(STEPS)])
            # Clipped, as in the paper's recipe. Elements whose true gradient is 0, such as those of a key's bias, are
            # then below AdamW's eps; without it rounding would move them by as much as others.
            trainer = StageTrainer(wrapped, stream, optimizer, stage=stage, clip_norm=0.1)
            trainer.register_hooks([notes := Notes()])
            trainer.train(0, STEPS)
            weights = {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
            found[stage, mixing, way] = (notes.losses, notes.gradients, weights)
    torch.save(found, f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[int, int], dict]:
    """By number of processes and rank."""
    folder = tmp_path_factory.mktemp("counts")
    for world in COUNTS:
        processes.call(train, *((rank, world, str(folder)) for rank in range(world)))
    ranks = [(world, rank) for world in COUNTS for rank in range(world)]
    return {(w, r): torch.load(folder / f"{w}_{r}.pt", weights_only=True) for w, r in ranks}


def relative(found: list, expected: list) -> float:
    """Norm of the difference over the norm of the second; None counts as zero."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None or b is not None]
    zero = torch.zeros(())
    difference = sum((zero if a is None else a).sub(zero if b is None else b).norm() ** 2 for a, b in pairs)
    return float(difference / sum(b.norm() ** 2 for _, b in pairs if b is not None)) ** 0.5


@pytest.mark.parametrize(("stage", "mixing"), KINDS)
def test_the_number_of_processes_changes_nothing(runs, stage, mixing):
    losses, gradients, weights = runs[1, 0][stage, mixing, "ours"]
    fresh = {n: p.detach() for n, p in build(stage).named_parameters()}
    moved = relative([*weights.values()], [fresh[name] for name in weights])
    assert moved > 1e-3, "nothing was trained"
    for world in COUNTS[1:]:
        for way in ways(stage, mixing):
            logged, averaged, _ = runs[world, 0][stage, mixing, way]
            loss = max(
                abs(a[n] - b[n]) / max(abs(b[n]), 1) for a, b in zip(logged, losses, strict=True) for n in b
            )
            gradient = max(relative(*pair) for pair in zip(averaged, gradients, strict=True))
            ends = [runs[world, rank][stage, mixing, way][2] for rank in range(world)]
            assert all(torch.equal(end[n], ends[0][n]) for end in ends for n in weights)
            weight = relative([ends[0][n] for n in weights], [*weights.values()])
            print(
                f"{stage} {mixing} {world} {way}: {loss:.0e} {gradient:.0e} {weight:.0e}, moved {moved:.0e}"
            )
            assert loss < 1e-6 and gradient < 1e-5 and weight < 1e-6
