"""The images of unseen things: names as the benchmark finds them, and scenes that no result has chosen."""

import numpy as np
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from towerbench.demo import emoji, regions, unseen
from towerbench.features import FeatureStore, Images
from visft.applications import demo_unseen
from visft.applications.compared_towers import load

SCENES = [0, 1, 2]


@pytest.fixture(scope="module")
def towers():
    base, tuned = (load(demo_tower.NAME, demo_tower.TAG) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.clip.visual.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator) * parameter.data.abs()
    return base, tuned


@pytest.fixture(scope="module")
def drawn(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unseen")
    return demo_unseen.draw(towers, folder, SCENES), folder


@pytest.mark.parametrize("side", (0, 1))
def test_names_are_those_of_the_benchmark(towers, drawn, side):
    def make():
        yield from (scene.image for scene in unseen.scenes("test")[: len(SCENES)])

    images = Images("some", len(SCENES), make, scale=unseen.DENSE_SCALE, dense=True)
    store = FeatureStore(towers[side], [images])
    features = store.project(regions.pooled(store, images, "test", "mask"))
    names = store.class_embeddings(unseen.categories(), emoji.TEMPLATES)
    expected = [unseen.categories()[i] for i in (features @ names.T).argmax(1).tolist()]
    store.close()
    views = [(scene.before, scene.after)[side] for scene in drawn[0]]
    assert [name for view in views for name in view.names] == expected


def test_scenes_are_whole(drawn):
    scenes, folder = drawn
    for scene, number in zip(scenes, SCENES, strict=True):
        truth = unseen.scenes("test")[number].objects
        assert scene.truth == tuple(unseen.categories()[item.category] for item in truth)
        largest = max(range(len(truth)), key=lambda i: truth[i].mask.sum())
        assert scene.text == scene.truth[largest]
        for view in (scene.before, scene.after):
            for panel in (view.masks, view.similarity, view.features):
                assert panel.shape == scene.image.shape and panel.dtype == np.uint8
        assert not (scene.before.features == scene.after.features).all()
        assert min(Image.open(folder / f"scene_{number}.png").size) > 700


def test_equal_towers_look_the_same(towers, tmp_path):
    [scene] = demo_unseen.draw([towers[0], towers[0]], tmp_path, [2])
    assert scene.before.names == scene.after.names
    for kind in ("masks", "similarity", "features"):
        assert (getattr(scene.before, kind) == getattr(scene.after, kind)).all()


def test_first_various_scenes_are_chosen():
    various = [len({item.category for item in scene.objects}) >= 3 for scene in unseen.scenes("test")]
    assert demo_unseen.chosen() == [number for number, enough in enumerate(various) if enough][:4]
