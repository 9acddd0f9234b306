"""Bytes that each of two real gloo processes sends in a step of stage lora, counted where PyTorch is called."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import processes
import torch
import torch.distributed as dist
from demo_models import picture
from objective_models import with_objectives
from two_processes import step

from visft.engine.optimizer import average_gradients
from visft.modeling.backbone import lora, sharding

WORLD = 2
SENT = {
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,  # its name in newer versions of PyTorch
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "all_reduce": 2,
}
"""How often a ring moves (N - 1) / N of the larger tensor."""


def counted(folder: Path) -> dict:
    """Return bytes by strategy, and numbers of parameters: of the blocks without LoRA, and of LoRA."""
    processes.call(_work, *((rank, f"file://{folder}/store", str(folder)) for rank in range(WORLD)))
    return json.loads((folder / "bytes.json").read_text())


def _work(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        found = {}
        for strategy in ("DDP", "FSDP2"):
            model = with_objectives(heads=("detection",))
            adapters = sum(tensor.numel() for tensor in lora.state_dict(model.backbone).values())
            blocks = sum(p.numel() for block in model.backbone.blocks for p in block.parameters())
            if strategy == "FSDP2":
                sharding.shard(model.backbone)
            with _sent() as tensors:
                step(model, [picture(number=1), picture(number=2)])
                average_gradients(p for p in model.parameters() if p.requires_grad)
            found[strategy] = sum(tensors)
        found |= {"LoRA": adapters, "blocks": blocks - adapters}
        if rank == 0:
            Path(folder, "bytes.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _sent() -> Iterator[list[float]]:
    sent: list[float] = []
    originals = {name: getattr(dist, name) for name in SENT if hasattr(dist, name)}
    inside = []  # the function that is running: one may call another

    def counting(name: str):
        def call(*tensors, **options):
            if not inside:
                largest = max(t.nbytes for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor))
                sent.append(SENT[name] * (WORLD - 1) / WORLD * largest)
            inside.append(name)
            try:
                return originals[name](*tensors, **options)
            finally:
                inside.pop()

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
