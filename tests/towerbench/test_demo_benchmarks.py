"""The demo suite's benchmarks: what they show, that they measure what they say, on few images."""

from pathlib import Path

import numpy as np
import pytest

from demoworld import catalogue, scenes
from towerbench import Context
from towerbench.demo import emoji, few_shot, retrieval, robustness, unseen, zero_shot


@pytest.fixture
def few(monkeypatch):
    """Sixty emoji and 24 scenes in all, so that a test is a matter of seconds."""
    kept = emoji.unseen()[200:260]
    monkeypatch.setattr(emoji, "unseen", lambda: kept)
    monkeypatch.setattr(unseen, "COUNTS", dict.fromkeys(unseen.COUNTS, 24))
    monkeypatch.setattr(robustness, "COUNT", 12)
    monkeypatch.setattr(few_shot, "CLASSES", 5)
    unseen.scenes.cache_clear()
    yield
    unseen.scenes.cache_clear()


def scores(cls, store, seed=0, **context) -> np.ndarray:
    benchmark = cls(Context(**context))
    return benchmark.items(store, benchmark.images(seed), seed)


def test_zero_shot_is_far_above_chance_and_splits_share_nothing(store, few):
    found = scores(zero_shot.ZeroShotEmoji, store)
    assert found.shape == (30,) and found.mean() > 0.5
    assert not set(emoji.of_split("test")) & set(emoji.of_split("development"))


def test_emoji_are_in_no_scene_of_fine_tuning():
    shown = {i for c in catalogue.COCO_CATEGORIES for i in catalogue.drawing_indices(c.drawings)}
    assert not shown & set(emoji.unseen())
    assert not set(unseen.categories()) & {c.name for c in catalogue.COCO_CATEGORIES}
    assert len(unseen.categories()) > 80


def test_views_depend_on_seed_and_nothing_else():
    first = [list(emoji.views(emoji.unseen()[:3], 2, seed).make()) for seed in (0, 0, 1)]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])
    assert np.shape(first[0]) == (6, 64, 64, 3) and first[0][0].dtype == np.uint8


def test_other_vendor(store, few, tmp_path):
    """Drawings of another vendor, here discs of different colours, which a tower knows nothing of."""
    everything = catalogue.catalogue()
    for number, i in enumerate(emoji.unseen()):
        colour = f"hsl({number * 47 % 360},80%,50%)"
        disc = f'<circle cx="4" cy="4" r="3" fill="{colour}"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{disc}</svg>'
        (tmp_path / f"{everything[i].key.upper()}.svg").write_text(svg)
    (tmp_path / "readme.svg").write_text("<svg/>")
    assert zero_shot.ZeroShotVendor.missing(Context()) == "needs --pictures"
    assert zero_shot.ZeroShotVendor.missing(Context(images=tmp_path)) is None
    assert scores(zero_shot.ZeroShotVendor, store, images=tmp_path).mean() < 0.2
    assert scores(few_shot.FewShotVendor, store, images=tmp_path).shape == (5, 5)


def test_more_shots_are_better(store, few):
    found = scores(few_shot.FewShotEmoji, store)
    assert found.shape == (5, 5) and found[:, -1].mean() > 0.8 and found[:, -1].mean() >= found[:, 0].mean()


def test_digits(store, monkeypatch):
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    digits.images, digits.target = digits.images[:800], digits.target[:800]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    found = scores(few_shot.FewShotDigits, store)
    assert found.shape == (400, 5) and found[:, -1].mean() > 0.5 > 0.1
    train, test, _, _ = few_shot.FewShotDigits(Context())._halves()
    assert not set(train) & set(test)


def test_retrieval_finds_more_than_chance(store, few):
    found = scores(retrieval.RetrievalScenes, store)
    assert found.shape == (24, 6) and found[:, 0].mean() > 3 / 24


def test_corruptions_grow_stronger():
    image = next(iter(emoji.views(emoji.unseen()[:1], 1, 0).make())).astype(np.float64)
    found = list(robustness.corrupted(image.astype(np.uint8), np.random.default_rng(0)))
    assert len(found) == 20 and all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in found)
    distance = np.array([np.abs(p - image).mean() for p in found]).reshape(4, 5)
    assert (np.diff(distance, axis=1) > 0).all()


def test_robustness(store, few):
    found = scores(robustness.RobustnessEmoji, store)
    assert found.shape == (12, 20)
    mildest, strongest = found[:, ::5].mean(), found[:, 4::5].mean()
    assert mildest > strongest


def test_unseen_scenes_are_the_same_every_time_and_parts_differ(few):
    first = unseen.scenes("test")
    unseen.scenes.cache_clear()
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, unseen.scenes("test"), strict=True))
    assert not np.array_equal(first[0].image, unseen.scenes("train")[0].image)
    scene = next(s for s in first if len({o.category for o in s.objects}) == 1)
    name = unseen.categories()[scene.objects[0].category]
    assert scenes.count_phrase(name, len(scene.objects)) in scene.captions[0]
    assert Path(scenes.__file__).is_file()
