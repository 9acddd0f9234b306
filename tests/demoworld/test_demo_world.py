"""The demo world: its catalogue, scenes and files, and the pretraining of its tower."""

import filecmp
import json
import os
import signal

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file

from demoworld import augment, catalogue, dataset, optimizer, pretrain, scenes, tower
from demoworld.errors import DemoWorldError

NUM_TRAIN, NUM_VAL = 40, 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return dataset.make(
        tmp_path_factory.mktemp("world") / "demo", num_train=NUM_TRAIN, num_val=NUM_VAL, seed=3
    )


def _files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# ---------------------------------------------------------------- catalogue


def test_catalogue_has_a_thousand_distinct_names_and_62_coco_categories():
    emoji = catalogue.catalogue()
    assert len(emoji) > 1000
    assert len({e.name for e in emoji}) == len({e.key for e in emoji}) == len(emoji)
    assert (
        len({c.id for c in catalogue.COCO_CATEGORIES})
        == len({c.name for c in catalogue.COCO_CATEGORIES})
        == 62
    )
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    coco = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
    assert all(coco[c.id] == c.name for c in catalogue.COCO_CATEGORIES)


def test_every_drawing_stands_for_one_category_and_splits_are_disjoint():
    every = [text for c in catalogue.COCO_CATEGORIES for text in c.drawings]
    assert len(set(every)) == len(every)
    train = {text for c in catalogue.COCO_CATEGORIES for text in c.train}
    held_out = {text for c in catalogue.COCO_CATEGORIES for text in c.held_out}
    unseen = {e.text for e in catalogue.unseen_emoji()}
    assert held_out and not train & held_out and not unseen & set(every)
    assert all(c.train for c in catalogue.COCO_CATEGORIES)
    assert len(catalogue.drawing_indices(every)) == len(every)


def test_another_vendors_images_are_matched_by_code_points(tmp_path):
    from PIL import Image

    for name in ("1f415.png", "2708-fe0f.png", "unrelated.png", "1f1e6.png"):
        Image.new("RGBA", (20, 20), (255, 0, 0, 255)).save(tmp_path / name)
    images, index = catalogue.other_images(tmp_path, size=32)
    assert [catalogue.catalogue()[i].text for i in index] == ["\u2708", "\U0001f415"]
    assert images.shape == (2, 32, 32, 4)
    with pytest.raises(DemoWorldError, match="no image named by"):
        catalogue.other_images(tmp_path / "nowhere")


# ---------------------------------------------------------------- scenes


def test_occlusion_is_respected():
    shared = 0
    for i in range(60):
        scene = scenes.compose(np.random.default_rng(i))
        assert scene.objects
        count = sum(item.mask.astype(int) for item in scene.objects)
        assert count.max() == 1, "a pixel belongs to the frontmost object alone"
        shared += len(scene.objects) > 1
    assert shared > 10


def test_a_covered_object_loses_what_the_one_before_it_covers(monkeypatch):
    """Two sprites of known shape at one place: the one behind keeps the rest, or is left out."""
    from PIL import Image

    small, large = np.zeros((96, 96, 4), np.uint8), np.zeros((96, 96, 4), np.uint8)
    small[:48] = (255, 0, 0, 255)
    large[:] = (0, 255, 0, 255)
    images = [(0, Image.fromarray(small)), (1, Image.fromarray(large))]
    monkeypatch.setattr(
        scenes, "_background", lambda kind, h, w, rng: (np.zeros((h, w, 3), np.uint8), "black")
    )
    cast = scenes.Cast(("a", "b"), ((0,), (1,)), ((0,), (1,)), tuple(images), (False, False))

    for order, expected in (([0, 1], 2), ([1, 0], None)):
        monkeypatch.setattr(scenes, "_layout", lambda rng, categories, order=order: order)
        for seed in range(20):
            scene = scenes.compose(np.random.default_rng(seed), cast=cast)
            red, green = scene.image[..., 0], scene.image[..., 1]
            by_category = {item.category: item.mask for item in scene.objects}
            # Edges are mixed colours, so pixels clearly of one colour are held against the masks.
            for category, colour, other in ((0, red, green), (1, green, red)):
                mask = by_category.get(category, np.zeros(red.shape, bool))
                assert mask[(colour > 200) & (other < 50)].all() and (colour[mask] > 60).all()
                assert not mask[(colour < 50) & (other > 200)].any()
            assert scene.objects[0].category == order[0] and (
                expected is None or len(scene.objects) <= expected
            )


def test_captions_count_and_relate():
    height = width = 100
    masks = [np.zeros((height, width), bool) for _ in range(3)]
    masks[0][10:20, 0:10] = masks[1][10:20, 12:22] = masks[2][10:20, 80:90] = True
    index = {c.name: i for i, c in enumerate(catalogue.COCO_CATEGORIES)}
    objects = [
        scenes.SceneObject(index[n], 0, m) for n, m in zip(("dog", "dog", "banana"), masks, strict=True)
    ]
    captions = scenes.captions_of(objects, "orange", np.random.default_rng(0))
    assert captions[0] == "two dogs and a banana"
    assert captions[1] in ("two dogs to the left of a banana", "a banana to the right of two dogs")
    assert captions[2] == "two dogs and a banana on an orange background"
    assert (
        scenes.count_phrase("apple", 1) == "an apple" and scenes.count_phrase("person", 3) == "three people"
    )


# ---------------------------------------------------------------- files


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    again = dataset.make(tmp_path / "again", num_train=NUM_TRAIN, num_val=NUM_VAL, seed=3)
    names = _files(world.root)
    assert names == _files(again.root) and len(names) == NUM_TRAIN + NUM_VAL + 100 + 7
    _, different, errors = filecmp.cmpfiles(world.root, again.root, names, shallow=False)
    assert not different and not errors
    other = dataset.make(tmp_path / "other", num_train=2, num_val=1, seed=4)
    name = f"{dataset.SCENES_OF_HEADS + 1:012d}.jpg"
    assert (other.images("train") / name).read_bytes() != (world.images("train") / name).read_bytes()


def test_later_scenes_are_those_of_a_longer_world(world, tmp_path):
    """Scenes that a head was not trained on: the same numbers, images and masks, none of the earlier ones."""
    first = dataset.SCENES_OF_HEADS + NUM_TRAIN - 1
    later = dataset.make(tmp_path / "later", num_train=2, num_val=NUM_VAL, seed=3, first_train=first)
    names = [f"{number:012d}.jpg" for number in (first, first + 1)]
    assert sorted(path.name for path in later.images("train").iterdir()) == names
    for name in names:
        assert (later.images("train") / name).read_bytes() == (world.images("train") / name).read_bytes()
    assert later.instances("val").read_bytes() == world.instances("val").read_bytes()
    masks = {}
    for data in (world, later):
        content = json.loads(data.instances("train").read_text())
        masks[data] = [a["segmentation"] for a in content["annotations"] if a["image_id"] >= first]
    assert masks[world] == masks[later] and masks[later]
    with pytest.raises(DemoWorldError, match="numbered from 1"):
        dataset.make(tmp_path / "none", num_train=1, num_val=1, first_train=0)


def test_masks_agree_with_boxes_and_images(world):
    from PIL import Image
    from pycocotools.coco import COCO

    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        coco = COCO(str(world.instances(split)))
        assert len(coco.imgs) == count and len(coco.cats) == 62
        assert any(a["category_id"] > 62 for a in coco.anns.values()), "COCO's ids, not contiguous ones"
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation).astype(bool)
            image = coco.imgs[annotation["image_id"]]
            assert mask.shape == (image["height"], image["width"])
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w - 1, y + h - 1) == (columns[0], rows[0], columns[-1], rows[-1])
            assert annotation["area"] == mask.sum() > 0
        sizes = set()
        for image in coco.imgs.values():
            with Image.open(world.images(split) / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                sizes.add(picture.size)
        assert len(sizes) == 3
        captions = COCO(str(world.captions(split)))
        assert {a["image_id"] for a in captions.anns.values()} == set(coco.imgs)
        assert "OpenMoji" in json.loads(world.instances(split).read_text())["info"]["contributor"]


def test_training_never_shows_held_out_drawings_or_backgrounds(world):
    held_out = {catalogue.Emoji(text, "").key for c in catalogue.COCO_CATEGORIES for text in c.held_out}
    shown = {
        split: {a["emoji"] for a in json.loads(world.instances(split).read_text())["annotations"]}
        for split in ("train", "val")
    }
    assert not shown["train"] & held_out and shown["val"] & held_out
    unseen = {e.key for e in catalogue.unseen_emoji()}
    assert not (shown["train"] | shown["val"]) & unseen
    kinds = {scenes.compose(np.random.default_rng(i)).background for i in range(40)}
    kinds_held_out = {scenes.compose(np.random.default_rng(i), held_out=True).background for i in range(40)}
    assert kinds == set(scenes.TRAIN_BACKGROUNDS) and kinds_held_out > set(scenes.HELD_OUT_BACKGROUNDS)


def test_a_finished_folder_is_kept_and_a_foreign_one_refused(tmp_path):
    root = tmp_path / "demo"
    dataset.make(root, num_train=2, num_val=1)
    stamp = (root / dataset.MARKER).stat().st_mtime_ns
    dataset.make(root, num_train=2, num_val=1)
    assert (root / dataset.MARKER).stat().st_mtime_ns == stamp
    dataset.make(root, num_train=3, num_val=1)
    assert len(list((root / "train").iterdir())) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DemoWorldError, match="was not made by make_demo_data"):
        dataset.make(tmp_path / "mine", num_train=2, num_val=1)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(DemoWorldError):
        dataset.make(tmp_path / "none", num_train=0)


def test_a_failed_make_leaves_nothing(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "captions_of", broken)
    with pytest.raises(KeyboardInterrupt):
        dataset.make(tmp_path / "demo", num_train=2, num_val=1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- pretraining

MINIATURE = {
    "samples": 8 * 8,
    "batch_size": 8,
    "classes": 40,
    "phases": (pretrain.Phase(0.4, 16), pretrain.Phase(0.8, 32, 0.5), pretrain.Phase(1.0, 64)),
}


def _pretrain_and_die(folder: str, step: int) -> None:
    """Checkpoint at every step, and be killed before that of `step` comes to its place."""
    torch.set_num_threads(1)
    run = pretrain.Pretraining(folder, pretrain.Settings(**MINIATURE), resume=True, checkpoint_seconds=0.0)
    replace = os.replace

    def dying(source, target):
        if target.name == pretrain.CHECKPOINT and run.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying
    run.run()


def test_held_out_vendors_are_evaluated_and_in_no_batch(tmp_path):
    """Of two further vendors, one of which draws black squares: no batch shows any, the final figures name both."""
    for name, colour in (("trained", "#ffffff"), ("held-out", "#000000")):
        (tmp_path / name).mkdir()
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><path fill="{colour}" d="M0 0h1v1H0z"/></svg>'
        for emoji in catalogue.catalogue()[:40]:
            (tmp_path / name / f"{emoji.key}.svg").write_text(svg)
    views = pretrain.Views(40, [tmp_path / "trained"], [tmp_path / "held-out"])
    banks = views._banks_of(16)
    assert [int(bank[:, :3].amax()) for bank in banks[1:]] == [255, 0]
    without = pretrain.Views(40, [tmp_path / "trained"])
    for step in range(3):
        batches = [v.batch(16, 40, pretrain.step_generator(0, "training", step)) for v in (views, without)]
        assert torch.equal(batches[0][0], batches[1][0]) and batches[0][1] == batches[1][1]
    run = pretrain.Pretraining(
        tmp_path / "run",
        pretrain.Settings(**MINIATURE),
        images=[tmp_path / "trained"],
        held_out_images=[tmp_path / "held-out"],
    )
    assert run.run() is not None
    final = json.loads((tmp_path / "run" / pretrain.LOG_FILE).read_text().splitlines()[-1])
    assert {f"{v}/top1" for v in ("openmoji", "vendor1", "vendor2")} <= final.keys()


def test_a_killed_pretraining_ends_with_the_same_bits(tmp_path, one_thread):
    whole = pretrain.Pretraining(tmp_path / "whole", pretrain.Settings(**MINIATURE)).run()
    # A process that checkpoints at every step is killed with the fifth checkpoint written but not in its place.
    killed = tmp_path / "killed"
    child = processes.begin(_pretrain_and_die, str(killed), 5)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (killed / pretrain.FINAL_FILE).exists()
    resumed = pretrain.Pretraining(killed, resume=True)
    assert resumed.step == 4
    file = resumed.run()
    a, b = load_file(whole), load_file(file)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    log = [json.loads(line) for line in (killed / pretrain.LOG_FILE).read_text().splitlines()]
    assert log[-1]["final"] and log[-1]["samples"] == 64 and log[-1]["sha256"]


def test_pretraining_refuses_what_it_cannot_go_on_with(tmp_path):
    with pytest.raises(DemoWorldError, match="samples or in minutes"):
        pretrain.Settings()
    with pytest.raises(DemoWorldError, match="holds no run"):
        pretrain.Pretraining(tmp_path / "new", resume=True)
    run = pretrain.Pretraining(tmp_path / "run", pretrain.Settings(**MINIATURE))
    with pytest.raises(DemoWorldError, match="--resume"):
        pretrain.Pretraining(tmp_path / "run", pretrain.Settings(**MINIATURE))
    run.save()
    checkpoint = tmp_path / "run" / pretrain.CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(DemoWorldError, match="cannot be resumed"):
        pretrain.Pretraining(tmp_path / "run", resume=True)


def test_own_forward_equals_open_clips_at_native_size():
    model = pretrain.create_tower(0).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            pretrain.encode_image(model.visual, images), model.encode_image(images), rtol=1e-5, atol=1e-5
        )
        assert pretrain.encode_image(model.visual, torch.randn(2, 3, 32, 32)).shape == (2, 192)


def test_updates_of_hidden_matrices_are_nearly_orthogonal():
    u = optimizer._orthogonalised(torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(u)
    assert singular.min() > 0.5 and singular.max() < 1.3


# ---------------------------------------------------------------- the shipped tower


@pytest.mark.skipif(not tower.WEIGHTS_FILE.exists(), reason="the tower has not been pretrained yet")
def test_open_clip_loads_the_shipped_tower_and_it_knows_its_emoji():
    import open_clip

    tower.register_open_clip()
    tower.register_open_clip()
    assert open_clip.list_models().count(tower.NAME) == 1
    model = open_clip.create_model(tower.NAME, pretrained=tower.TAG).eval()
    assert next(model.parameters()).dtype == torch.float32
    views = pretrain.Views()
    index = torch.arange(0, len(views.names), 11)
    bank = augment.premultiplied(torch.from_numpy(catalogue.openmoji_images()), 64)
    images = augment.augmented_views(bank, index, views.flippable, torch.Generator().manual_seed(2**40))
    classes = tower.class_embeddings(model, views.names, tower.TEMPLATES[:1])
    score = tower.zero_shot(model, [(images, index)], classes)
    assert score["top1"] > 20, "chance is 0.07 %"


def test_unseen_scenes_are_those_of_the_suite_under_their_own_names(world):
    from towerbench.demo import unseen

    content = json.loads(world.instances("unseen").read_text())
    assert len(content["images"]) == 100
    known = {c.name for c in catalogue.COCO_CATEGORIES}
    names = {row["id"]: row["name"] for row in content["categories"]}
    assert tuple(names.values()) == unseen.categories() and not known & set(names.values())
    for number in (0, 57):
        scene = unseen.scenes("test")[number]
        rows = [row for row in content["annotations"] if row["image_id"] == number + 1]
        assert [row["bbox"] for row in rows] == [list(item.box) for item in scene.objects]
        assert [names[row["category_id"]] for row in rows] == [
            unseen.categories()[item.category] for item in scene.objects
        ]
