"""Naming objects and cells: exact features reach the top, those of other images are at chance, and what is drawn."""

from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from oracle import Oracle
from timm.models.vision_transformer import VisionTransformer

from demoworld import tower as demo_tower
from demoworld import unseen_things
from towerbench import Context, Tower, encoder
from towerbench.demo import dense, goi, regions, unseen
from towerbench.segmentation import overlaps
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.tower_adapters import TimmTower, adapt

EVERY = (goi.GoiZeroShot, goi.GoiProbe, dense.DenseProbe, dense.DenseText, dense.DenseCorrespondence)


@pytest.fixture(scope="module", autouse=True)
def few():
    """Six things in few scenes, so that a test is a matter of seconds."""
    caches = (unseen.cast, unseen.scenes, regions.objects)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unseen_things, "_THINGS", unseen_things._THINGS[:6])
        counts = {"train": 70, "validation": 24, "test": 30, "development": 24}
        patch.setattr(unseen, "COUNTS", counts)
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def scores(cls, store) -> tuple[np.ndarray, float]:
    benchmark = cls(Context())
    found = np.asarray(benchmark.items(store, benchmark.images(0), 0), dtype=np.float64)
    return found, float(benchmark.figure(found.mean(0)))


@pytest.mark.parametrize("cls", EVERY[:4])
def test_exact_features_reach_the_top_and_those_of_other_scenes_do_not(cls):
    found, best = scores(cls, Oracle())
    assert len(found) == 30
    # Cells are coarser than masks: a segmentation cannot be exact.
    assert best > (0.95 if cls.family == "goi" else 0.75), best
    _, shuffled = scores(cls, Oracle(shuffled=True))
    assert shuffled < 0.6 * best
    if cls.family == "goi":
        found, _ = scores(cls, Oracle(shuffled=True))
        assert found[:, 0].sum() / found[:, -1].sum() < 2.5 / 6  # at the first guess, of six


def test_correspondence_of_places_is_exact_where_they_are_told():
    """Features that are nothing but a point's place in the scene, in the warped image as well, are all found."""
    matrices = [dense.warped(scene.image, number)[1] for number, scene in enumerate(unseen.scenes("test"))]
    y, x = (torch.arange(16) + 0.5).div(16).unsqueeze(1), (torch.arange(16) + 0.5).div(16)

    def told(places):
        waves = torch.cat([places * f for f in torch.arange(1, 9) * np.pi / 2], 1)
        return torch.cat((waves.sin(), waves.cos()), 1).float()

    class Places:
        def dense(self, images, start=0, stop=None):
            here = torch.stack(torch.broadcast_tensors(x[None], y))
            if "warped" not in images.key:
                return told(here[None].repeat(stop - start, 1, 1, 1))
            found = []
            for matrix in matrices[start:stop]:
                turn, shift = torch.from_numpy(matrix[:, :2]), torch.from_numpy(matrix[:, 2])
                back = torch.linalg.inv(turn) @ (here.flatten(1).double() - shift[:, None])
                found.append(back.view(2, 16, 16).float())
            return told(torch.stack(found))

    assert scores(dense.DenseCorrespondence, Places())[1] > 0.98
    constant = SimpleNamespace(dense=lambda images, start, stop: torch.ones(stop - start, 4, 16, 16))
    assert scores(dense.DenseCorrespondence, constant)[1] < 0.1


def test_a_warped_image_is_where_its_matrix_says():
    image = np.zeros((128, 128, 3), np.uint8)
    image[30:36, 80:86] = 255
    for number in range(4):
        turned, matrix = dense.warped(image, number)
        rows, columns = np.nonzero(turned.mean(2) > turned.mean() + 60)
        expected = 128 * (matrix @ (83 / 128, 33 / 128, 1))
        assert np.abs([columns.mean() + 0.5, rows.mean() + 0.5] - expected).max() < 1


def test_overlaps_by_hand():
    truth, predicted = torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([[0, 1, 1], [1, 0, 0]])
    assert overlaps(predicted, truth, 2).tolist() == [1, 2, 2, 3]
    assert overlaps(predicted, truth, 3).tolist() == [1, 2, 0, 4, 3, 2]
    figure = dense.DenseProbe(Context()).figure(np.array([1.0, 2, 0, 2, 3, 0]))
    assert figure == pytest.approx((1 / 2 + 2 / 3) / 2)  # a class that is nowhere counts for nothing


def test_pooled_features_are_means_over_the_object():
    scene = unseen.scenes("test")[0]
    features = regions.pooled(Oracle(), unseen.images("test", dense=True), "test", "mask")
    weights = regions.coverage(scene.objects[0].mask, (16, 16))
    expected = (Oracle().map(scene) * weights).sum((1, 2)) / weights.sum()
    torch.testing.assert_close(features[0], expected)
    assert regions.coverage(scene.objects[0].mask, (1, 1)).item() == pytest.approx(
        scene.objects[0].mask.mean()
    )
    labels = dense.labels_at(scene, 64)
    shares = torch.bincount(labels.flatten(), minlength=7) / labels.numel()
    assert shares[6].item() == pytest.approx(1 - sum(o.mask.mean() for o in scene.objects), abs=0.03)


def poolers():
    """Each way to come from tokens to an embedding: the tower, and its parts."""
    tiny = Tower.load(demo_tower.NAME, "demo", device="cpu").clip.visual
    sizes = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
    attentional = open_clip.transformer.VisionTransformer(
        **sizes, output_dim=24, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2
    )
    yield from ((visual, adapt(visual)) for visual in (tiny, attentional))
    for pool in ("map", "avg"):
        visual = torch.nn.Module()  # as open_clip's TimmModel, whose trunks are large
        visual.trunk = VisionTransformer(
            img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=0, global_pool=pool
        )
        visual.head = torch.nn.Linear(32, 24)
        yield visual, TimmTower(visual, visual.trunk)


def ours(visual: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    return CLIPViT(visual).patch_embeddings(features)


@pytest.mark.parametrize("patch_embeddings", [encoder.patch_embeddings, ours])
def test_an_image_of_patches_that_are_alike_has_their_embedding(patch_embeddings):
    torch.manual_seed(0)
    for visual, parts in poolers():
        visual.eval()
        token = torch.randn(3, parts.embed_dim)
        with torch.no_grad():
            expected = parts.embedding(token[:, None].expand(-1, 5, -1))
            found = patch_embeddings(visual, parts.dense_norm()(token))
        torch.testing.assert_close(
            found, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-3, atol=1e-4
        )


def test_a_tower_against_itself_has_the_same_figures(against_itself):
    by_name = {row["name"]: row["base"] for row in against_itself(*EVERY)["benchmarks"]}
    assert by_name["goi probe"] > 40 and by_name["dense correspondence"] > 20
