"""The training stream follows from (seed, iteration) alone; evaluation sees every image once."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch

from visft.data import (
    ImageError,
    ViSFTMapper,
    build_test_loader,
    build_train_loader,
    register_own_data,
)
from visft.data.loader import TrainLoader, load_records
from visft.data.workers import pins_memory
from visft.errors import ConfigError, DataError


def _take(loader, count: int) -> list[list[dict]]:
    return list(itertools.islice(loader, count))


def _assert_same(found: list[list[dict]], expected: list[list[dict]]) -> None:
    assert [len(batch) for batch in found] == [len(batch) for batch in expected]
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert a["image_id"] == b["image_id"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)


@pytest.mark.parametrize("recipe", ["detection", "lsj"])
def test_resuming_with_any_number_of_workers_goes_on_to_the_bit(cfg, recipe: str) -> None:
    cfg.VISFT.INPUT.AUGMENTATION = recipe
    whole = _take(build_train_loader(cfg, batch_size=3, seed=5), 7)
    for workers, start in ((0, 4), (2, 0), (2, 4)):
        cfg.DATALOADER.NUM_WORKERS = workers
        resumed = build_train_loader(cfg, batch_size=3, start_iteration=start, seed=5)
        _assert_same(_take(resumed, 7 - start), whole[start:])


def test_processes_share_the_batches_of_one(cfg) -> None:
    records = load_records(("visft_own_train",), train=True)
    mapper = ViSFTMapper(cfg, is_train=True)
    one, *two = (
        _take(TrainLoader(records, mapper, batch_size=4, seed=1, start_iteration=2, rank=r, world_size=w), 4)
        for r, w in ((0, 1), (0, 2), (1, 2))
    )
    assert all(len(batch) == 2 for batch in itertools.chain(*two))
    _assert_same([a + b for a, b in zip(*two, strict=True)], one)


def test_a_batch_that_processes_cannot_share(cfg) -> None:
    records = load_records(("visft_own_train",), train=True)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 3, which 2 processes"):
        TrainLoader(records, ViSFTMapper(cfg, is_train=True), batch_size=3, seed=0, rank=0, world_size=2)


def test_every_epoch_sees_every_image_once_in_another_order(cfg) -> None:
    ids = [s["image_id"] for batch in _take(build_train_loader(cfg, batch_size=2, seed=0), 14) for s in batch]
    epochs = [tuple(ids[i : i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_seed_and_epoch_change_the_augmentation(cfg) -> None:
    def shapes(seed: int, start: int) -> dict[int, tuple]:
        loader = build_train_loader(cfg, batch_size=7, seed=seed, start_iteration=start)
        return {s["image_id"]: tuple(s["image"].shape) for s in next(loader)}

    first = shapes(0, 0)
    assert shapes(0, 0) == first
    assert shapes(1, 0) != first and shapes(0, 1) != first


def test_the_global_generators_are_left_alone(cfg) -> None:
    def states() -> tuple:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        before = states()
        next(build_train_loader(cfg, batch_size=2, seed=0))
        next(iter(build_test_loader(cfg, "visft_own_test")))
        assert states() == before


def test_a_mapper_may_draw_from_any_generator(cfg) -> None:
    """Its draws at a position depend neither on the batch nor on what was drawn before."""

    def draw(record: dict) -> dict:
        return {
            "draws": (random.random(), np.random.rand(), torch.rand(()).item()),
            "image_id": record["image_id"],
        }

    records = load_records(("visft_own_train",), train=True)
    by_one = [s for b in _take(TrainLoader(records, draw, batch_size=1, seed=3), 12) for s in b]
    random.seed(9)
    by_four = [s for b in _take(TrainLoader(records, draw, batch_size=4, seed=3), 3) for s in b]
    assert by_one == by_four and len({s["draws"] for s in by_one}) == 12


def test_images_without_objects(cfg, coco) -> None:
    content = coco.content()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 5)
    coco.write(content)

    def seen() -> set[int]:
        return {
            s["image_id"] for batch in _take(build_train_loader(cfg, batch_size=7, seed=0), 2) for s in batch
        }

    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert seen() == {1, 3, 4, 6, 7}
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert seen() == {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_training_with_its_name(cfg, coco, workers: int) -> None:
    (coco.images / "4.png").write_bytes((coco.images / "4.png").read_bytes()[:100])
    cfg.DATALOADER.NUM_WORKERS = workers
    for loader in (build_train_loader(cfg, batch_size=7, seed=0), build_test_loader(cfg, "visft_own_test")):
        with pytest.raises(ImageError) as raised:
            _take(loader, 7)
        message = str(raised.value)
        assert message.startswith(str(coco.images / "4.png")) and "\n" not in message


def test_broken_images_are_replaced_and_counted(cfg, coco, caplog) -> None:
    whole = _take(build_train_loader(cfg, batch_size=7, seed=0), 2)
    for broken in ("4.png", "5.png"):
        (coco.images / broken).write_bytes(b"broken")
    cfg.DATALOADER.SKIP_BROKEN = True
    with caplog.at_level(logging.WARNING, logger="visft.data.loader"):
        loader = build_train_loader(cfg, batch_size=7, seed=0)
        batches = _take(loader, 2)
    for kept, before in zip(itertools.chain(*batches), itertools.chain(*whole), strict=True):
        # The others are as they were: image, place and augmentation.
        if before["image_id"] not in (4, 5):
            assert torch.equal(kept["image"], before["image"])
        else:
            assert kept["image_id"] == 6 and "skipped" not in kept
    assert loader.skipped == {str(coco.images / "4.png"): 2, str(coco.images / "5.png"): 4}
    warnings = [r.getMessage() for r in caplog.records if r.name == "visft.data.loader"]
    assert [w[:20] for w in warnings] == ["Epoch 1: 3 times an ", "Epoch 2: 3 times an "]
    cfg.DATALOADER.NUM_WORKERS = 2
    _assert_same(_take(build_train_loader(cfg, batch_size=7, seed=0), 2), batches)


def test_nothing_but_broken_images(cfg, coco) -> None:
    for path in coco.images.iterdir():
        path.write_bytes(b"broken")
    cfg.DATALOADER.SKIP_BROKEN = True
    with pytest.raises(DataError, match="7 of its 7 images cannot be used, the first: .*1.png"):
        next(build_train_loader(cfg, batch_size=2, seed=0))


def test_evaluation_sees_every_image_once_in_order(cfg) -> None:
    loader = build_test_loader(cfg, "visft_own_test")
    assert len(loader) == 7
    assert [[s["image_id"] for s in batch] for batch in loader] == [[i] for i in range(1, 8)]


def test_evaluation_leaves_broken_images_out_with_a_count(cfg, coco, caplog) -> None:
    (coco.images / "4.png").write_bytes(b"broken")
    cfg.DATALOADER.SKIP_BROKEN = True
    with caplog.at_level(logging.WARNING, logger="visft.data.loader"):
        found = [s["image_id"] for batch in build_test_loader(cfg, "visft_own_test") for s in batch]
    assert found == [1, 2, 3, 5, 6, 7]
    assert "1 of 7 images" in caplog.text and "4.png" in caplog.text


def test_data_sets_are_checked_by_the_loader_too(cfg, coco) -> None:
    content = coco.content()
    content["annotations"][3]["bbox"] = [0, 0, 0, 0]
    coco.write(content)
    with pytest.raises(DataError, match="annotation 103 has a box without area"):
        build_train_loader(cfg, batch_size=1, seed=0)


def test_captions_that_are_broken(cfg, tmp_path) -> None:
    path = tmp_path / "captions.json"
    cfg.VISFT.DATA.TRAIN_CAPTIONS = str(path)
    register_own_data(cfg)
    path.write_text('{"annotations": [{"id": 3, "image_id": 1}]}')
    with pytest.raises(DataError, match="annotation 3 is no caption"):
        build_train_loader(cfg, batch_size=1, seed=0)


def test_the_demo_world_is_registered_with_captions() -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from visft.data import register_all

    register_all()
    register_all()  # harmless
    assert {"visft_demo_train", "visft_demo_val"} <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("visft_demo_val").caption_json.endswith("captions_val.json")
    assert MetadataCatalog.get("coco_2017_val").caption_json.endswith(
        "coco/annotations/captions_val2017.json"
    )


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cuda:1", True), ("cpu", False)])
def test_images_lie_in_pinned_memory_for_a_gpu_alone(cfg, device: str, pinned: bool, monkeypatch) -> None:
    cfg.MODEL.DEVICE = device
    assert not pins_memory(cfg)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pins_memory(cfg) == pinned
    for loader in (build_train_loader(cfg, batch_size=3, seed=5), build_test_loader(cfg, "visft_own_train")):
        assert loader._loader.pin_memory == pinned
