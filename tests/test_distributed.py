"""Two processes learn what one would from the joined batch, whatever labels each of them has."""

import processes
import pytest
import torch
import torch.distributed as dist
from batches_of_processes import BATCHES, backward, batches, build, gradients
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from visft.engine import stages
from visft.engine.optimizer import average_gradients
from visft.modeling.backbone.open_clip_models import BaseTower
from visft.modeling.meta_arch import UNLABELLED

WORLD = 2
STAGES = ("heads", "lora", "lora balanced")
FILES = {"random weights": None, "one file": ("a", "a"), "two files": ("a", "b")}


def shared(rank: int, hashes: tuple[str, str] | None) -> dict[str, torch.Tensor]:
    """What a process holds once weights that differ between the two were shared."""
    model = build("lora")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)
    model.backbone.base = BaseTower("test", "file" if hashes else None, hashes[rank] if hashes else "random")
    stages._share_weights(model)
    return model.state_dict()


def work(rank: int, store: str, output: str) -> None:
    """One of two processes: every batch in both stages, by DistributedDataParallel and by our own averaging."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        found = {}
        for stage in STAGES:
            ours = build(stage)
            # As detectron2's create_ddp_model makes it: without find_unused_parameters.
            ddp = DistributedDataParallel(build(stage), broadcast_buffers=False)
            for name in BATCHES:
                images = batches(name)[rank]
                losses = backward(ddp, images)
                found[stage, name, "ddp"] = (losses, gradients(ddp.module))
                # detectron2's own averaging of the metrics must find the same names on every process.
                with EventStorage():
                    tensors = {key: torch.tensor(value) for key, value in losses.items()}
                    SimpleTrainer.write_metrics(tensors, 0.0, 0)
                losses = backward(ours, images)
                average_gradients(p for p in ours.parameters() if p.requires_grad)
                found[stage, name, "ours"] = (losses, gradients(ours))
        found |= {name: shared(rank, hashes) for name, hashes in FILES.items()}
        torch.save(found, f"{output}/{comm.get_rank()}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> list[dict]:
    """What each of two processes found, by stage, batch and way of averaging."""
    folder = tmp_path_factory.mktemp("distributed")
    store = f"file://{folder}/store"  # no port that another process could take
    processes.call(work, *((rank, store, str(folder)) for rank in range(WORLD)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def single() -> dict:
    """What one process finds in the joined batch."""
    found = {}
    for stage in STAGES:
        model = build(stage)
        for name in BATCHES:
            losses = backward(model, sum(batches(name), []))
            found[stage, name] = (losses, gradients(model))
    return found


def relative(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> float:
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


@pytest.mark.parametrize("way", ["ddp", "ours"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_of_the_joined_batch(group, single, name, stage, way):
    losses, expected = single[stage, name]
    labelled = list(losses) != [UNLABELLED]
    assert any(g is not None and g.abs().sum() > 0 for g in expected.values()) == labelled
    for found in group:
        assert relative(found[stage, name, way][1], expected) < 1e-6
    first, second = (found[stage, name, way][1] for found in group)
    for key, gradient in first.items():
        assert (gradient is None) == (second[key] is None)
        assert gradient is None or torch.equal(gradient, second[key]), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BATCHES)
def test_mean_losses_are_those_of_the_joined_batch(group, single, name, stage):
    expected = single[stage, name][0]
    for way in ("ddp", "ours"):
        first, second = (found[stage, name, way][0] for found in group)
        assert set(first) == set(second) == set(expected)
        for key, value in expected.items():
            assert (first[key] + second[key]) / WORLD == pytest.approx(value, rel=1e-5, abs=1e-7), key


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


@pytest.mark.parametrize("files", FILES)
def test_the_main_process_gives_all_but_a_tower_that_all_read_from_one_file(group, files):
    main, other = (found[files] for found in group)
    kept = {name for name, tensor in other.items() if not torch.equal(tensor, main[name])}
    tower = {
        name for name, _ in build("lora").backbone.named_parameters(prefix="backbone") if ".lora." not in name
    }
    assert kept == (tower if files == "one file" else set()) and len(tower) > 10
