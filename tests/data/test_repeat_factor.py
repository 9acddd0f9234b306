"""Repeat-factor sampling: detectron2's factors, in a stream that follows from (seed, position)."""

import itertools
import logging

import numpy as np
import pytest
from coco_shapes import CATEGORIES
from detectron2.data.samplers import RepeatFactorTrainingSampler

from visft.data import build_stage_loader, build_train_loader, load_labelled
from visft.data.repeat_factor import RepeatedOrder, build_repeats, check_sampler, repeat_factors
from visft.errors import ConfigError


def records(count: int = 200, seed: int = 0) -> list[dict]:
    """Pictures with some of 30 classes, class k in about one of k + 1."""
    rng = np.random.default_rng(seed)
    return [
        {
            "annotations": [
                {"category_id": c} for c in range(30) for _ in range(2) if rng.random() < 0.5 / (c + 1)
            ]
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(("threshold", "sqrt"), [(0.001, True), (0.1, True), (0.5, True), (0.1, False)])
def test_factors_are_detectron2s(threshold, sqrt):
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records(), threshold, sqrt=sqrt
    )
    found = repeat_factors(records(), threshold, sqrt)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert bool(found.max() > 1) is (threshold > 0.001)


def test_images_without_annotations_come_once():
    assert repeat_factors([{"annotations": []}, {"captions": ["a"]}], 0.5).tolist() == [1, 1]


def test_each_record_comes_as_often_as_its_factor_says():
    factors = np.array([1.0, 1.5, 3.0, 2.25, 1.0])
    order = RepeatedOrder(factors, seed=4)
    epochs = 400
    length = sum(int(order._copies(e).sum()) for e in range(epochs))
    counts = np.bincount([order(p) for p in range(length)])
    np.testing.assert_allclose(counts / epochs, factors, atol=0.1)
    assert counts[[0, 2, 4]].tolist() == [epochs, 3 * epochs, epochs]


def test_an_epoch_has_all_its_records_before_the_next_begins():
    factors = np.array([1.0, 1.5, 2.0])
    order = RepeatedOrder(factors, seed=1)
    start = 0
    lengths = set()
    for epoch in range(20):
        copies = order._copies(epoch)
        found = [order(p) for p in range(start, start + int(copies.sum()))]
        assert np.bincount(found).tolist() == copies.tolist()
        start += len(found)
        lengths.add(len(found))
    assert lengths == {4, 5}


def test_any_position_can_be_asked_for_first():
    factors = repeat_factors(records(), 0.1)
    whole = [RepeatedOrder(factors, seed=9)(p) for p in range(0, 1500, 7)]
    order = RepeatedOrder(factors, seed=9)
    assert [order(p) for p in range(0, 1500, 7)] == whole
    assert [RepeatedOrder(factors, seed=10)(p) for p in range(0, 1500, 7)] != whole


@pytest.fixture
def rare(cfg, coco):
    """The small data set, in which one image of seven has the class `blue`."""
    content = coco.content()
    blue = next(c["id"] for c in CATEGORIES if c["name"] == "blue")
    content["annotations"] = [
        a for a in content["annotations"] if a["category_id"] != blue or a["image_id"] == 3
    ]
    coco.write(content)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    return cfg


def ids(loader, batches: int) -> list[list[int]]:
    return [[s["image_id"] for s in batch] for batch in itertools.islice(loader, batches)]


def test_the_loader_repeats_rare_classes(rare, caplog):
    caplog.set_level(logging.INFO, logger="visft.data.repeat_factor")
    seen = np.bincount(sum(ids(build_train_loader(rare, batch_size=4, seed=0), 40), []), minlength=8)
    # sqrt(0.9 * 7) = 2.5 times as often as the others.
    assert 2 < seen[3] / np.delete(seen, [0, 3]).mean() < 3
    assert "1 of 7 images come more than once, up to 2.5 times; an epoch has 9" in caplog.text


def test_a_resumed_stream_with_repeats_goes_on(rare):
    whole = ids(build_train_loader(rare, batch_size=4, seed=3), 12)
    for workers in (0, 2):
        rare.DATALOADER.NUM_WORKERS = workers
        assert ids(build_train_loader(rare, batch_size=4, seed=3, start_iteration=7), 5) == whole[7:]


def test_without_rare_classes_the_stream_is_the_plain_one(cfg):
    plain = ids(build_train_loader(cfg, batch_size=3, seed=2), 9)
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.001
    assert ids(build_train_loader(cfg, batch_size=3, seed=2), 9) == plain


@pytest.mark.parametrize("mixing", ["joint", "ratio"])
def test_a_stages_loader_repeats_in_either_way_of_mixing(rare, mixing):
    rare.MODEL.VISFT.HEADS, rare.VISFT.TASK_MIXING = ("detection",), mixing
    rare.VISFT.SOLVER.HEADS.IMS_PER_BATCH = 4
    images = load_labelled(rare, {"detection": lambda image: "instances" in image})
    loader = build_stage_loader(rare, "heads", images, seed=0)
    seen = np.bincount(sum(ids(loader, 40), []), minlength=8)
    assert 2 < seen[3] / np.delete(seen, [0, 3]).mean() < 3


@pytest.mark.parametrize(
    ("sampler", "threshold", "words"),
    [
        ("RandomSubsetTrainingSampler", 0.0, "SAMPLER_TRAIN is `RandomSubsetTrainingSampler`; expected"),
        ("RepeatFactorTrainingSampler", 0.0, "REPEAT_THRESHOLD is 0.0"),
    ],
)
def test_samplers_that_would_do_nothing_are_refused(cfg, sampler, threshold, words):
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = sampler, threshold
    with pytest.raises(ConfigError, match=words):
        check_sampler(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    assert build_repeats(cfg, records()) is None
