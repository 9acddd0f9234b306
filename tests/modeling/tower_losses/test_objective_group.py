"""Objectives beside heads and alone: two processes learn what one would, and heads what they would without them."""

import processes
import pytest
import torch
import torch.distributed as dist
from demo_models import losses_of, picture
from objective_models import CAPTIONS, captioned, with_objectives
from torch.nn.parallel import DistributedDataParallel

from visft.engine.optimizer import average_gradients
from visft.errors import ConfigError
from visft.modeling.meta_arch import UNLABELLED

EVERY = ("anchor", "contrastive", "self_distillation")
BOXES = ("MODEL.VISFT.SELF_DISTILLATION.REGIONS", "boxes")
BALANCED = ("MODEL.VISFT.BALANCE_GRADIENTS", True, *BOXES)
HEADS = ("detection", "segmentation")
WORLD = 2


def said(number: int, caption: int | None, **kind) -> dict:
    """An image, with a caption where there is one."""
    image = picture(number=number, **kind)
    return image if caption is None else image | {"captions": [CAPTIONS[caption]]}


# The images of each process.
BATCHES = {
    "everything": [[said(1, 0), said(2, 1)], [said(3, 2), said(4, 0)]],
    "captions on one": [[said(1, 0), said(2, 1), said(3, 2)], [said(4, None), said(5, None)]],
    "captions apart": [[said(1, 0), said(2, None)], [said(3, 1), said(4, 2), said(5, None)]],
    "no labels on the first": [
        [said(1, None, boxes=False, masks=False)],
        [said(2, 0), said(3, 1, masks=False)],
    ],
    "no labels": [[said(1, None, boxes=False, masks=False)], [said(2, None, boxes=False, masks=False)]],
    "a task": [[said(1, 0) | {"task": "segmentation"}], [said(2, 1) | {"task": "segmentation"}]],
}


def step(model, images: list[dict]) -> dict[str, float]:
    """Gradients of one step; its losses."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    losses = model(images)
    sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}


def grads(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros(()) if g is None else g for name, g in found.items()}


def build(heads: bool):
    return with_objectives(*EVERY, options=BALANCED if heads else BOXES, heads=HEADS if heads else ())


def work(rank: int, store: str, output: str) -> None:
    """One of two processes, with heads and without, by our own averaging and by DistributedDataParallel."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        found = {}
        for heads in (True, False):
            ours = build(heads)
            ddp = DistributedDataParallel(build(heads), broadcast_buffers=False)
            for name, parts in BATCHES.items():
                losses = step(ours, parts[rank])
                average_gradients(p for p in ours.parameters() if p.requires_grad)
                found[heads, name, "ours"] = (losses, grads(ours))
                found[heads, name, "ddp"] = (step(ddp, parts[rank]), grads(ddp.module))
        torch.save(found, f"{output}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("objectives")
    processes.call(work, *((rank, f"file://{folder}/store", str(folder)) for rank in range(WORLD)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def single() -> dict:
    found = {}
    for heads in (True, False):
        model = build(heads)
        for name, parts in BATCHES.items():
            found[heads, name] = (step(model, sum(parts, [])), grads(model))
    return found


@pytest.mark.parametrize("way", ["ours", "ddp"])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_two_processes_learn_what_one_does_from_the_joined_batch(group, single, name, heads, way):
    losses, expected = single[heads, name]
    assert {key.split("/")[0] for key in losses} >= {"anchor"}
    first, second = (part[heads, name, way][0] for part in group)
    assert set(first) == set(second) == set(losses)
    for key, value in losses.items():
        assert (first[key] + second[key]) / WORLD == pytest.approx(value, rel=1e-5, abs=1e-7), key
    whole = torch.cat([g.flatten().double() for g in expected.values()])
    assert whole.norm() > 0
    for part in group:
        own = part[heads, name, way][1]
        assert list(own) == list(expected)
        difference = torch.cat([g.flatten().double() for g in own.values()]) - whole
        assert difference.norm() < 3e-6 * whole.norm()


def test_heads_learn_what_they_would_without_objectives():
    images = [said(1, 0), said(2, 1)]
    plain = losses_of(with_objectives(heads=HEADS), images)
    beside = losses_of(with_objectives(*EVERY, heads=HEADS, options=BOXES), images)
    assert {name for name in beside if name not in plain} == {f"{name}/loss" for name in EVERY}
    assert all(torch.equal(value, beside[name]) for name, value in plain.items())


def test_objectives_act_in_the_towers_stage_alone():
    model = with_objectives(*EVERY, stages=("heads", "lora"))
    assert model.stage == "heads"
    assert {name.split("/")[0] for name in losses_of(model, captioned(2))} == {"detection"}
    model.set_stage("lora")
    assert {name.split("/")[0] for name in losses_of(model, captioned(2))} == {"detection", *EVERY}


def test_without_heads():
    model = with_objectives("contrastive", heads=())
    losses = losses_of(model, captioned(3))
    assert list(losses) == ["contrastive/loss"]
    assert list(losses_of(model, [picture()])) == [UNLABELLED]
    assert model.eval()([picture()]) == [{}]
    for options in ({}, {"stages": ("heads", "lora")}):
        with pytest.raises(ConfigError, match="MODEL.VISFT.HEADS"):
            with_objectives(*(("anchor",) if options else ()), heads=(), **options)


def test_an_unknown_objective_is_said():
    with pytest.raises(ConfigError, match="`anchr` is unknown; the nearest is `anchor`"):
        with_objectives("anchr")
    with pytest.raises(ConfigError, match="OBJECTIVE: `Anchr` is unknown; the nearest is `Anchor`"):
        with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.OBJECTIVE", "Anchr"))
