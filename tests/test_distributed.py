"""Two processes learn what one would from the joined batch, whatever labels each of them has."""

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visft.backbone import CLIPViT, lora
from visft.backbone.open_clip_zoo import BaseTower
from visft.engine import stages
from visft.engine.optim import average_gradients
from visft.heads import DETRHead, LabelSpace, Mask2FormerHead, RegionTextHead
from visft.meta_arch import UNLABELLED, ViSFT

SIZE = (48, 64)
WORLD = 2

# The labels of each process's two pictures: how many objects, and whether with boxes and masks. None: no labels.
BOTH, BOXES, MASKS = ("boxes", "masks"), ("boxes",), ("masks",)
BATCHES = {
    "all labels": [[(2, BOTH), (3, BOTH)], [(1, BOTH), (0, BOTH)]],
    "no masks on one": [[(2, BOTH), (3, BOTH)], [(2, BOXES), (1, BOXES)]],
    "heads apart": [[(2, BOXES), (1, BOXES)], [(3, MASKS), (1, MASKS)]],
    "no labels on one": [[(2, BOTH), (3, BOTH)], [None, None]],
    "no labels on the first": [[None, None], [(2, BOTH), None]],
    "one object in all": [[(1, BOTH), (0, BOTH)], [(0, BOTH), (0, BOTH)]],
    "no objects": [[(0, BOTH)], [(0, BOTH), (0, BOTH)]],
    "no masks anywhere": [[(2, BOXES)], [(1, BOXES), (2, BOXES)]],
    "no labels anywhere": [[None], [None]],
    # The task that TASK_MIXING `ratio` has drawn.
    "task segmentation": [[(2, BOTH), (3, BOTH)], [(1, BOTH), (0, BOTH)]],
    "task detection": [[(2, BOTH)], [(1, BOTH)]],
}
STAGES = ("heads", "lora", "lora balanced")


def picture(spec: tuple[int, tuple[str, ...]] | None, number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator)
    found = {"image": image, "image_id": number, "height": SIZE[0], "width": SIZE[1]}
    if spec is not None:
        count, kinds = spec
        low = torch.rand(count, 2, generator=generator) * torch.tensor([30.0, 20.0])
        boxes = torch.cat((low, low + 10 + torch.rand(count, 2, generator=generator) * 15), dim=1)
        instances = Instances(SIZE)
        instances.gt_classes = torch.randint(0, 4, (count,), generator=generator)
        if "boxes" in kinds:
            instances.gt_boxes = Boxes(boxes)
        if "masks" in kinds:
            masks = torch.zeros(count, *SIZE, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(masks)
        if count or len(kinds) > 1:
            found["instances"] = instances
    return found


def batches(name: str) -> list[list[dict]]:
    """The batch of each process."""
    specs = BATCHES[name]
    task = {"task": name.removeprefix("task ")} if name.startswith("task ") else {}
    return [[picture(s, 10 * rank + i) | task for i, s in enumerate(part)] for rank, part in enumerate(specs)]


class NamedHead(RegionTextHead):
    """With embeddings of its names that need no text encoder."""

    def bind(self, backbone: CLIPViT) -> None:
        self.embeddings = nn.functional.normalize(torch.randn(4, 16), dim=-1)
        self.rows, self.sigmoid, self._backbone = torch.arange(4), False, (backbone,)


def build(stage: str) -> ViSFT:
    """A small model with the same weights in every process, LoRA away from zero, no dropout.

    Stage `lora balanced` is `lora` with balanced gradients.
    """
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(11)
    tower = VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16
    )
    backbone = CLIPViT(tower)
    lora.inject(backbone, rank=2, alpha=2.0)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    detector = DETRHead(
        in_channels=32,
        labels=LabelSpace(4),
        num_queries=5,
        encoder_layers=1,
        encoder_dim=16,
        decoder_layers=2,
        decoder_dim=16,
        num_attention_heads=2,
        feedforward_dim=16,
        dropout=0.0,
    )
    segmenter = Mask2FormerHead(
        in_channels=32,
        labels=LabelSpace(4),
        num_queries=5,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        decoder_layers=2,
        dim=32,
        num_attention_heads=2,
        feedforward_dim=16,
        num_points=40,
    )
    named = NamedHead(names=[("a",), ("b",), ("c",), ("d",)], logit_scale=5.0)
    heads = {"detection": detector, "segmentation": segmenter, "region_text": named}
    return ViSFT(
        backbone=backbone,
        heads=heads,
        loss_weights=(1.0, 0.5, 2.0),
        balance_gradients=stage.endswith("balanced"),
        stage=stage.split()[0],
    ).train()


def gradients(model: ViSFT) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def backward(model: nn.Module, images: list[dict]) -> dict[str, float]:
    """Gradients of one step in `model`; its losses. All processes draw from the same seed."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    losses = model(images)
    sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}


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
def processes(tmp_path_factory) -> list[dict]:
    """What each of two processes found, by stage, batch and way of averaging."""
    folder = tmp_path_factory.mktemp("distributed")
    store = f"file://{folder}/store"  # no port that another process could take
    torch.multiprocessing.spawn(work, args=(store, str(folder)), nprocs=WORLD)
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

    def flat(gradient):
        return torch.cat([(g if g is not None else like.new_zeros(like.shape)).flatten().double()
                          for g, like in zip(gradient.values(), shapes, strict=True)])  # fmt: skip

    assert list(found) == list(expected)
    shapes = [
        next((g for g in pair if g is not None), torch.zeros(()))
        for pair in zip(found.values(), expected.values(), strict=True)
    ]
    difference, norm = (flat(found) - flat(expected)).norm(), flat(expected).norm()
    return float(difference / norm) if norm else float(difference)


@pytest.mark.parametrize("way", ["ddp", "ours"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_of_the_joined_batch(processes, single, name, stage, way):
    losses, expected = single[stage, name]
    labelled = list(losses) != [UNLABELLED]
    assert any(g is not None and g.abs().sum() > 0 for g in expected.values()) == labelled
    for found in processes:
        assert relative(found[stage, name, way][1], expected) < 1e-6
    first, second = (found[stage, name, way][1] for found in processes)
    for key, gradient in first.items():
        assert (gradient is None) == (second[key] is None)
        assert gradient is None or torch.equal(gradient, second[key]), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BATCHES)
def test_mean_losses_are_those_of_the_joined_batch(processes, single, name, stage):
    expected = single[stage, name][0]
    for way in ("ddp", "ours"):
        first, second = (found[stage, name, way][0] for found in processes)
        assert set(first) == set(second) == set(expected)
        for key, value in expected.items():
            assert (first[key] + second[key]) / WORLD == pytest.approx(value, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("stage", ["heads", "lora"])
def test_a_head_without_labels_anywhere_is_left_alone(processes, single, stage):
    """By our own averaging there is no gradient, so that no weight decay is at work either."""
    for name in ("no masks anywhere", "no labels anywhere"):
        expected = {key for key, g in single[stage, name][1].items() if g is None}
        for found in processes:
            assert {key for key, g in found[stage, name, "ours"][1].items() if g is None} == expected


def test_the_drawn_task_trains_its_head_alone(single):
    """The gradient is that of a model without the other head's loss; the other head gets none at all."""
    for task, other in (("segmentation", "detection"), ("detection", "segmentation")):
        losses, found = single["heads", f"task {task}"]
        assert losses and all(name.startswith(f"{task}/") for name in losses)
        assert all((gradient is None) == (f"heads.{other}." in name) for name, gradient in found.items())


@pytest.mark.parametrize("files", FILES)
def test_the_main_process_gives_all_but_a_tower_that_all_read_from_one_file(processes, files):
    main, other = (found[files] for found in processes)
    kept = {name for name, tensor in other.items() if not torch.equal(tensor, main[name])}
    tower = {
        name for name, _ in build("lora").backbone.named_parameters(prefix="backbone") if ".lora." not in name
    }
    assert kept == (tower if files == "one file" else set()) and len(tower) > 10
