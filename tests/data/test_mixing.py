"""Mixing tasks: draws with given ratios, each task's own stream, data sets with different labels."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from coco_shapes import make_coco

from visft.data import ImageError, build_stage_loader, load_labelled
from visft.data.loader import MixedLoader, Task, TrainLoader
from visft.data.samplers import TaskDraws, derived_seed
from visft.errors import ConfigError, DataError

HEADS = ("detection", "segmentation", "captioning")
HAS_LABELS = {
    "detection": lambda image: "instances" in image and image["instances"].has("gt_boxes"),
    "segmentation": lambda image: "instances" in image and image["instances"].has("gt_masks"),
    "captioning": lambda image: bool(image.get("captions")),
}


def labels_for(*heads: str) -> dict:
    return {head: HAS_LABELS[head] for head in heads}


@pytest.fixture
def ratio(cfg):
    """The small data set, two of its seven images (3 and 6) with captions too, mixed by ratio."""
    from detectron2.data import DatasetCatalog

    whole = DatasetCatalog.get("visft_own_train")
    captioned = [r | {"captions": ["a shape", "shapes"]} if r["image_id"] in (3, 6) else r for r in whole]
    _registered("mixing_captioned", captioned, "visft_own_train")
    cfg.DATASETS.TRAIN = ("mixing_captioned",)
    cfg.MODEL.VISFT.HEADS = HEADS
    cfg.VISFT.TASK_MIXING = "ratio"
    cfg.VISFT.TASK_RATIOS = (0.3, 0.3, 0.4)
    for stage in ("HEADS", "LORA"):
        cfg.VISFT.SOLVER[stage].IMS_PER_BATCH = 2
    yield cfg
    _forget("mixing_captioned")


def _registered(name: str, records: list[dict], like: str | None = None) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog.register(name, lambda: records)
    if like is not None:
        MetadataCatalog.get(name).set(thing_classes=MetadataCatalog.get(like).thing_classes)


def _forget(*names: str) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def _take(loader, count: int) -> list[list[dict]]:
    return list(itertools.islice(loader, count))


def _loader(cfg, *, start: int = 0, stage: str = "lora", seed: int = 5, heads=HEADS):
    images = load_labelled(cfg, labels_for(*heads))
    return build_stage_loader(cfg, stage, images, start_iteration=start, seed=seed)


def _assert_same(found: list[list[dict]], expected: list[list[dict]]) -> None:
    assert [len(batch) for batch in found] == [len(batch) for batch in expected]
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (a["image_id"], a.get("task")) == (b["image_id"], b.get("task"))
        assert torch.equal(a["image"], b["image"])
        if "instances" in b:
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


# Draws


def test_frequencies_are_the_ratios():
    ratios = (0.3, 0.3, 0.4)
    draws = TaskDraws(ratios, seed=7)
    found = np.bincount([draws(i) for i in range(20_000)], minlength=3) / 20_000
    # Three standard deviations of a binomial.
    assert np.abs(found - ratios).max() < 3 * (0.4 * 0.6 / 20_000) ** 0.5
    # Independent of the draw before: pairs are as frequent as products of ratios say.
    pairs = np.zeros((3, 3))
    for i in range(0, 20_000, 2):
        pairs[draws(i), draws(i + 1)] += 1e-4
    assert np.abs(pairs - np.outer(ratios, ratios)).max() < 0.015


def test_a_draw_is_the_interval_of_a_uniform_number_of_its_iteration():
    """Written out again, so that no later version draws otherwise and breaks runs that are resumed."""
    draws = TaskDraws((1, 1, 2), seed=3)
    for iteration in (0, 1, 4095, 4096, 10_000):
        block, offset = divmod(iteration, 4096)
        uniform = np.random.Generator(np.random.PCG64([3, block])).random(offset + 1)[offset]
        assert draws(iteration) == (0 if uniform < 0.25 else 1 if uniform < 0.5 else 2)


def test_ratios_have_no_unit_and_seeds_differ():
    many = range(300)
    first = [TaskDraws((0.3, 0.7), seed=1)(i) for i in many]
    assert [TaskDraws((3, 7), seed=1)(i) for i in many] == first
    assert [TaskDraws((0.3, 0.7), seed=2)(i) for i in many] != first


@pytest.mark.parametrize("iterations", [0, 1, 100, 4096, 4097, 9000])
def test_counts_are_those_of_the_draws(iterations):
    draws = TaskDraws((0.2, 0.5, 0.3), seed=11)
    tally = [0, 0, 0]
    for i in range(iterations):
        tally[draws(i)] += 1
    assert draws.counts(iterations) == tally


# The loader


def test_a_batch_is_of_one_task_from_images_with_its_labels(ratio):
    batches = _take(_loader(ratio), 40)
    tasks = [{image["task"] for image in batch} for batch in batches]
    assert all(len(task) == 1 for task in tasks) and set().union(*tasks) == set(HEADS)
    seen = {head: {i["image_id"] for b in batches for i in b if i["task"] == head} for head in HEADS}
    assert seen["captioning"] == {3, 6}
    assert seen["detection"] == seen["segmentation"] == set(range(1, 8))
    # The drawn tasks are those of the draws, for the seed of the stage.
    draws = TaskDraws((0.3, 0.3, 0.4), derived_seed(derived_seed(5, "lora"), "tasks"))
    assert [batch[0]["task"] for batch in batches] == [HEADS[draws(i)] for i in range(40)]


def test_a_task_goes_through_its_images_epoch_by_epoch_whatever_is_drawn_between(ratio):
    """Its stream is the TrainLoader's over its images: the other tasks take nothing from it."""
    images = load_labelled(ratio, labels_for(*HEADS))
    for head in HEADS:
        mine = [[i for i in b if i["task"] == head] for b in _take(_loader(ratio), 40)]
        mine = [b for b in mine if b]
        from visft.data import ViSFTMapper

        alone = TrainLoader(
            images.of(head),
            ViSFTMapper(ratio, is_train=True),
            batch_size=2,
            seed=derived_seed(derived_seed(5, "lora"), head),
        )
        expected = [[i | {"task": head} for i in b] for b in _take(alone, len(mine))]
        _assert_same(mine, expected)
        ids, size = [i["image_id"] for b in mine for i in b], len(images.of(head))
        for epoch in range(len(ids) // size):
            assert len(set(ids[epoch * size : (epoch + 1) * size])) == size


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_with_any_number_of_workers_goes_on_to_the_bit(ratio, accumulate):
    ratio.VISFT.SOLVER.LORA.ACCUMULATE = accumulate
    ratio.VISFT.TASKS.SEGMENTATION.IMS_PER_BATCH = 3
    whole = _take(_loader(ratio), 12 * accumulate)
    for workers, start in ((0, 5), (2, 0), (2, 5), (1, 11)):
        ratio.DATALOADER.NUM_WORKERS = workers
        _assert_same(
            _take(_loader(ratio, start=start), (12 - start) * accumulate), whole[start * accumulate :]
        )


def test_the_batches_of_an_iteration_are_of_one_task(ratio):
    """Two batches of two are the same images as one of four."""
    ratio.VISFT.SOLVER.LORA.ACCUMULATE = 2
    halves = _take(_loader(ratio), 24)
    ratio.VISFT.SOLVER.LORA.ACCUMULATE = 1
    ratio.VISFT.SOLVER.LORA.IMS_PER_BATCH = 4
    _assert_same([a + b for a, b in zip(halves[::2], halves[1::2], strict=True)], _take(_loader(ratio), 12))


def test_processes_share_the_batches_of_one(ratio):
    images = load_labelled(ratio, labels_for("detection", "captioning"))

    def record_id(record: dict) -> dict:
        return {"image_id": record["image_id"], "draw": torch.rand(()).item()}

    tasks = [
        Task("detection", images.of("detection"), record_id, 4, seed=1),
        Task("captioning", images.of("captioning"), record_id, 2, seed=2),
    ]
    one, *two = (
        _take(MixedLoader(tasks, TaskDraws((1, 1), 1), start_iteration=3, rank=r, world_size=w), 12)
        for r, w in ((0, 1), (0, 2), (1, 2))
    )
    assert [a + b for a, b in zip(*two, strict=True)] == one
    assert {len(batch) for batch in one} == {2, 4}
    with pytest.raises(ConfigError, match="VISFT.TASKS.CAPTIONING.IMS_PER_BATCH is 2, which 4 processes"):
        MixedLoader(tasks, TaskDraws((1, 1), 1), rank=0, world_size=4)


def test_stages_and_seeds_draw_apart(ratio):
    def first(**where) -> list:
        return [(b[0]["task"], b[0]["image_id"]) for b in _take(_loader(ratio, **where), 12)]

    assert first(stage="heads") != first(stage="lora")
    assert first(seed=5) == first(seed=5) != first(seed=6)


def test_own_batch_size_augmentation_and_size(ratio):
    ratio.VISFT.INPUT.AUGMENTATION = "fixed"
    ratio.VISFT.INPUT.SIZE = 96
    ratio.VISFT.TASKS.CAPTIONING.IMS_PER_BATCH = 5
    ratio.VISFT.TASKS.CAPTIONING.SIZE = 64
    ratio.VISFT.TASKS.DETECTION.AUGMENTATION = "detection"
    ratio.VISFT.TASKS.DETECTION.MIN_SIZE_TRAIN = (40,)
    ratio.VISFT.TASKS.DETECTION.MAX_SIZE_TRAIN = 70
    ratio.freeze()
    sides = {head: set() for head in HEADS}
    for batch in _take(_loader(ratio), 40):
        task = batch[0]["task"]
        assert len(batch) == (5 if task == "captioning" else 2)
        sides[task] |= {tuple(image["image"].shape[1:]) for image in batch}
    assert {max(side) for side in sides["segmentation"]} == {96}
    assert {max(side) for side in sides["captioning"]} == {64}
    assert all(max(side) <= 70 and min(side) <= 40 for side in sides["detection"])


def test_a_head_of_the_users_own_has_the_common_values(ratio):
    """There is no node VISFT.TASKS.TAGS."""
    ratio.MODEL.VISFT.HEADS = ("tags", "detection")
    ratio.VISFT.TASK_RATIOS = ()
    images = load_labelled(ratio, {"tags": HAS_LABELS["detection"], "detection": HAS_LABELS["detection"]})
    batches = _take(build_stage_loader(ratio, "heads", images, seed=0), 12)
    assert {batch[0]["task"] for batch in batches} == {"tags", "detection"}
    assert {len(batch) for batch in batches} == {2}


def test_the_global_generators_are_left_alone(ratio):
    def states() -> tuple:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    for workers in (0, 2):
        ratio.DATALOADER.NUM_WORKERS = workers
        before = states()
        _take(_loader(ratio), 3)
        assert states() == before


def test_broken_images(ratio, coco, caplog):
    file = coco.images / "6.png"
    file.write_bytes(file.read_bytes()[:-300])  # its header is whole
    with pytest.raises(ImageError, match="6.png"):
        _take(_loader(ratio), 40)
    ratio.DATALOADER.SKIP_BROKEN = True
    with caplog.at_level(logging.WARNING, logger="visft.data.loader"):
        loader = _loader(ratio)
        batches = _take(loader, 40)
    # In its place comes another image of the task.
    assert {i["image_id"] for b in batches for i in b if i["task"] == "captioning"} == {3}
    assert sum(loader.skipped.values()) > 8 and set(loader.skipped) == {str(coco.images / "6.png")}
    assert any(r.getMessage().startswith("captioning: Epoch 1: 1 times an ") for r in caplog.records)


# Data sets with different labels


@pytest.fixture
def mixed(cfg, tmp_path):
    """Boxes without masks in one data set, captions in another, and an image without any label."""
    from detectron2.data import DatasetCatalog

    boxes = [
        r | {"annotations": [{k: v for k, v in a.items() if k != "segmentation"} for a in r["annotations"]]}
        for r in DatasetCatalog.get("visft_own_train")
    ]
    other = make_coco(tmp_path / "other", count=4)
    captions = [
        {"file_name": str(other.images / f"{i}.png"), "image_id": 100 + i, "captions": [f"picture {i}"]}
        for i in range(1, 4)
    ]
    nothing = {"file_name": str(other.images / "4.png"), "image_id": 104}
    _registered("mixing_boxes", boxes, "visft_own_train")
    _registered("mixing_captions", [*captions, nothing])
    cfg.DATASETS.TRAIN = ("mixing_boxes", "mixing_captions")
    cfg.MODEL.VISFT.HEADS = ("detection", "captioning")
    for stage in ("HEADS", "LORA"):
        cfg.VISFT.SOLVER[stage].IMS_PER_BATCH = 2
    yield cfg
    _forget("mixing_boxes", "mixing_captions")


def test_joint_feeds_all_images_that_carry_some_label(mixed):
    heads = ("detection", "captioning")
    batches = _take(_loader(mixed, heads=heads), 5)
    images = [image for batch in batches for image in batch]
    # One epoch: seven images with boxes, three with captions, not the one without labels.
    assert sorted(image["image_id"] for image in images) == [*range(1, 8), 101, 102, 103]
    for image in images:
        assert "task" not in image
        assert HAS_LABELS["detection"](image) == (image["image_id"] < 100)
        assert HAS_LABELS["captioning"](image) == (image["image_id"] > 100)
    _assert_same(_take(_loader(mixed, heads=heads, start=2), 3), batches[2:])


def test_joint_with_accumulation_goes_on_where_it_was(mixed):
    mixed.VISFT.SOLVER.LORA.ACCUMULATE = 3
    heads = ("detection", "captioning")
    whole = _take(_loader(mixed, heads=heads), 9)
    _assert_same(_take(_loader(mixed, heads=heads, start=2), 3), whole[6:])


def test_ratio_draws_each_task_from_its_own_data_set(mixed):
    mixed.VISFT.TASK_MIXING = "ratio"
    images = [i for b in _take(_loader(mixed, heads=("detection", "captioning")), 30) for i in b]
    assert {i["image_id"] for i in images if i["task"] == "detection"} == set(range(1, 8))
    assert {i["image_id"] for i in images if i["task"] == "captioning"} == {101, 102, 103}


@pytest.mark.parametrize("mixing", ["joint", "ratio"])
def test_a_head_that_no_image_has_labels_for(mixed, mixing, caplog):
    mixed.VISFT.TASK_MIXING = mixing
    mixed.MODEL.VISFT.HEADS = ("detection", "segmentation")
    if mixing == "ratio":
        with pytest.raises(DataError, match="mixing_boxes, mixing_captions.*11 images.*`segmentation`"):
            _loader(mixed, heads=("detection", "segmentation"))
    else:
        with caplog.at_level(logging.WARNING):
            _loader(mixed, heads=("detection", "segmentation"))
        assert "segmentation" in caplog.text and "detection" not in caplog.text
        with pytest.raises(DataError, match="`segmentation`"):
            _loader(mixed, heads=("segmentation",))


def test_images_without_objects_keep_their_captions(ratio):
    from detectron2.data import DatasetCatalog

    emptied = [
        r | {"annotations": []} if r["image_id"] in (2, 3) else r
        for r in DatasetCatalog.get("mixing_captioned")
    ]
    _forget("mixing_captioned")
    _registered("mixing_captioned", emptied, "visft_own_train")

    def seen(filter_empty: bool) -> dict[str, set[int]]:
        ratio.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
        images = load_labelled(ratio, labels_for(*HEADS))
        return {head: {r["image_id"] for r in images.of(head)} for head in HEADS}

    # An annotated image with nothing on it is a label too, unless the config filters it out.
    assert seen(False)["detection"] == {1, 2, 3, 4, 5, 6, 7}
    kept = seen(True)
    assert kept["detection"] == kept["segmentation"] == {1, 4, 5, 6, 7}
    assert kept["captioning"] == {3, 6}
