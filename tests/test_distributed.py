"""Two processes learn what one would from the joined batch, whatever labels each of them has."""

import functools

import processes
import pytest
import torch
import torch.distributed as dist
import two_processes
from batches_of_processes import BATCHES, batches, build

from visft.checkpoint.open_clip_models import BaseTower
from visft.engine.stage import share_weights
from visft.modeling.meta_arch import UNLABELLED

STAGES = ("heads", "lora", "lora balanced")
FILES = {"random weights": None, "one file": ("a", "a"), "two files": ("a", "b")}


@pytest.fixture(scope="module")
def steps() -> tuple[dict, dict]:
    """How to build the model of each stage, and the processes' batches."""
    return {stage: functools.partial(build, stage) for stage in STAGES}, {n: batches(n) for n in BATCHES}


@pytest.fixture(scope="module")
def group(steps, tmp_path_factory) -> list[dict]:
    return two_processes.together(*steps, tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def single(steps) -> dict:
    return two_processes.alone(*steps)


@pytest.mark.parametrize("way", two_processes.WAYS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_of_the_joined_batch(group, single, name, stage, way):
    losses, expected = single[stage, name]
    labelled = list(losses) != [UNLABELLED]
    assert any(g is not None and g.abs().sum() > 0 for g in expected.values()) == labelled
    for found in group:
        assert two_processes.relative(found[stage, name, way][1], expected) < 1e-6
    first, second = (found[stage, name, way][1] for found in group)
    for key, gradient in first.items():
        assert (gradient is None) == (second[key] is None)
        assert gradient is None or torch.equal(gradient, second[key]), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BATCHES)
def test_mean_losses_are_those_of_the_joined_batch(group, single, name, stage):
    for way in two_processes.WAYS:
        losses = [found[stage, name, way][0] for found in group]
        two_processes.assert_mean_losses(losses, single[stage, name][0])


@pytest.mark.parametrize("stage", ["heads", "lora"])
def test_a_head_without_labels_anywhere_is_left_alone(group, single, stage):
    """By our own averaging there is no gradient, so that no weight decay is at work either."""
    for name in ("no masks anywhere", "no labels anywhere"):
        expected = {key for key, g in single[stage, name][1].items() if g is None}
        for found in group:
            assert {key for key, g in found[stage, name, "ours"][1].items() if g is None} == expected


def test_the_drawn_task_trains_its_head_alone(single):
    """The gradient is that of a model without the other head's loss; the other head gets none at all."""
    for task, other in (("segmentation", "detection"), ("detection", "segmentation")):
        losses, found = single["heads", f"task {task}"]
        assert losses and all(name.startswith(f"{task}/") for name in losses)
        assert all((gradient is None) == (f"heads.{other}." in name) for name, gradient in found.items())


def share(rank: int, folder: str) -> None:
    """What a process holds once weights that differ between the two were shared."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for files, hashes in FILES.items():
        model = build("lora")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)
        base = ("file", hashes[rank]) if hashes else (None, "random")
        model.backbone.base = BaseTower("test", *base)
        share_weights(model)
        found[files] = model.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_main_process_gives_all_but_a_tower_that_all_read_from_one_file(tmp_path):
    processes.call(share, *((rank, str(tmp_path)) for rank in range(2)))
    main, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    backbone = build("lora").backbone
    tower = {n for n, _ in backbone.named_parameters(prefix="backbone") if ".lora." not in n}
    assert len(tower) > 10
    for files in FILES:
        kept = {name for name, value in other[files].items() if not torch.equal(value, main[files][name])}
        assert kept == (tower if files == "one file" else set()), files
