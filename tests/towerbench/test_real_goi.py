"""Regions of the real suite, on tiny sets that lie on disk as the true ones do."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import by_names
from PIL import Image
from pycocotools import mask as mask_api
from region_sets import ADE, SIZE, STUFF, THINGS, ade20k, coco, lvis, objects, scene
from sklearn.metrics import balanced_accuracy_score

from towerbench import region_pooling
from towerbench.errors import DataError
from towerbench.real import goi, maps, regions


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("regions")
    ade20k(root)
    coco(root)
    lvis(root)
    objects(root)
    return root


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(maps, "TEST", 8)


def boxed(x, y, w, h) -> np.ndarray:
    """A box as a mask."""
    mask = np.zeros(SIZE, bool)
    mask[y : y + h, x : x + w] = True
    return mask


def named_by_hand(store, benchmark, masks) -> tuple[list[int], np.ndarray]:
    """Labels and scores of regions from features averaged pixel by pixel.

    Args:
        masks: `(image, label, mask [H, W])` each.
    """
    texts = by_names(store, benchmark.test.names, maps.TEMPLATES)
    cells = store.dense(benchmark.images(0)["test"])
    pixels = cells.repeat_interleave(SIZE[0] // 16, 2).repeat_interleave(SIZE[1] // 16, 3)
    features = torch.stack([pixels[number][:, mask].mean(1) for number, _, mask in masks])
    return [label for _, label, _ in masks], (store.project(features) @ texts.T).numpy()


def class_mean(labels, guesses) -> float:
    """Scikit-learn's."""
    with pytest.warns(UserWarning, match="y_pred") if set(guesses) - set(labels) else nullcontext():
        return balanced_accuracy_score(labels, guesses)


def expected_figure(labels, scores) -> float:
    """The mean of class-mean top-1 and top-5."""
    order = np.argsort(-scores, axis=1)
    five = np.where((order[:, :5] == np.array(labels)[:, None]).any(1), labels, -1)
    return (class_mean(labels, order[:, 0]) + class_mean(labels, five)) / 2


@pytest.mark.parametrize("kind", regions.KINDS)
def test_segments_of_ade20k(store, of, tmp_path, kind):
    """Among few of its classes: with all 150 this tower names none of these right."""
    classes = (0, 2, 4, 7, 9, 12, 149)
    ade20k(tmp_path, (("validation", 6),), classes)
    benchmark = of(f"goi zero-shot ade20k {kind}", tmp_path)
    found = benchmark.items(store, benchmark.images(0), 0)
    masks = []
    for number in range(6):
        _, which, objects = scene(50 + number)
        which[:1] = -1
        for place, (what, box) in enumerate(objects):
            if (what < 3) == (kind != "stuff masks"):
                mask = boxed(*box) if kind == "boxes" else which == place
                masks.append((number, classes.index((*THINGS, *STUFF)[what]), mask))
    labels, scores = named_by_hand(store, benchmark, masks)
    assert len(found) == 6 and found.reshape(6, -1, 3)[..., 0].sum() == len(masks)
    figure = float(benchmark.figure(found.mean(0)))
    assert figure == pytest.approx(expected_figure(labels, scores), abs=1e-9) and 0 < figure < 1


def test_classes_of_ade20k(of):
    test = of("goi zero-shot ade20k boxes").test
    assert test.names[43] == ("signboard", "sign") and len(test.names) == 150
    assert [i for i in range(150) if test.things[i]] == list(THINGS)


@pytest.mark.parametrize("name", ["coco thing masks", "lvis thing masks", "lvis boxes"])
def test_instances(store, run, name):
    benchmark, found = run(f"goi zero-shot {name}")
    assert benchmark.in_domain
    places = [0, 1, 2]
    if "lvis" in name:  # its list has its ids in another order
        names = [("aerosol can", "spray can"), ("barrel", "cask"), ("bow (weapon)", "longbow")]
        assert benchmark.test.names == names
        places = [2, 0, 1]
    order = range(5, -1, -1)  # ids fall as numbers rise
    masks = [
        (place, places[what], boxed(*box))
        for place, number in enumerate(order)
        for what, box in scene(50 + number)[2][2:]
    ]
    assert found.reshape(6, -1, 3)[..., 0].sum() == len(masks)  # no crowds
    labels, scores = named_by_hand(store, benchmark, masks)
    assert float(benchmark.figure(found.mean(0))) == pytest.approx(expected_figure(labels, scores), abs=1e-9)


def test_boxes_of_objects365(run, of, caplog):
    goi._read.cache_clear()
    benchmark, found = run("goi zero-shot objects365 boxes")
    assert "1 boxes without area are left out" in caplog.text
    assert benchmark.test.names[12] == ("cabinet", "shelf") and len(benchmark.test.names) == 365
    assert len(found) == 8
    boxes = [r.box for s in benchmark.test.images for r in s.regions]
    assert all(box[0] >= 0 and box[2] > 0 and box[0] + box[2] <= 96 for box in boxes)
    probe = of("goi probe objects365 boxes")
    assert not {s for part in probe.parts.values() for s in part.sources} & set(benchmark.test.sources)


def test_resampled_images_give_the_accuracy_of_their_regions(run):
    """What the bootstrap draws: images, some of them several times."""
    benchmark, found = run("goi zero-shot coco boxes")
    by_class = found.reshape(6, -1, 3)
    for draw in np.random.default_rng(0).integers(0, 6, (20, 6)):
        means = np.tensordot(np.bincount(draw, minlength=6) / 6, found, 1)
        true, one, five = [], [], []
        for image in draw:
            for label, (count, first, within) in enumerate(by_class[image].astype(int)):
                true += [label] * count
                one += [label] * first + [-1] * (count - first)
                five += [label] * within + [-1] * (count - within)
        expected = (class_mean(true, one) + class_mean(true, five)) / 2
        assert float(benchmark.figure(means)) == pytest.approx(expected)
    assert benchmark.figure(np.stack([found.mean(0)] * 3)).shape == (3,)


@pytest.mark.parametrize(
    "name",
    ["ade20k boxes", "ade20k thing masks", "ade20k stuff masks", "objects365 boxes", "lvis thing masks"],
)
def test_a_probe_learns_what_colours_mean(run, name):
    benchmark, found = run(f"goi probe {name}")
    if "ade20k" in name:
        assert {len(part.images) for part in benchmark.parts.values()} == {12, 3}
    assert float(benchmark.figure(found.mean(0))) > 0.85


def test_coverage_of_boxes_is_that_of_their_pixels():
    rng = np.random.default_rng(0)
    for _ in range(10):
        x, y = rng.integers(0, 40), rng.integers(0, 30)
        w, h = rng.integers(1, 56), rng.integers(1, 34)
        found = region_pooling.box_coverage((x, y, w, h), SIZE, (16, 16))
        torch.testing.assert_close(found, region_pooling.coverage(boxed(x, y, w, h), (16, 16)))
    thin = region_pooling.box_coverage((10.3, 0.25, 0.4, 64), SIZE, (2, 3))
    torch.testing.assert_close(thin.sum() * 32 * 32, torch.tensor(0.4 * 63.75))
    assert thin[:, 1:].sum() == 0


def test_draws_to_train_on_have_the_rare_classes():
    labels = [[0, 0]] * 50 + [[0, 1]] * 3 + [[2]]
    chosen = regions.balanced(labels, 4, 3)
    assert {50, 51, 52, 53} <= set(chosen) and len(chosen) == 4  # three of class 0 come with class 1
    assert regions.balanced(labels, 4, 9) == regions.balanced(labels, 4, 9)
    assert len(regions.balanced(labels, 4, 1000)) == 54


def test_more_regions_than_a_probe_takes_are_left(of):
    found = of("goi probe coco boxes").parts["train"].of_kind("boxes", 2)
    counts = np.bincount([region.label for several in found for region in several], minlength=3)
    assert counts.tolist() == [2, 2, 2]


def test_one_set_of_images_for_all_kinds_and_for_segmentation(of):
    sets = [
        of(f"goi {method} ade20k {kind}").images(0)
        for method in ("zero-shot", "probe")
        for kind in regions.KINDS
    ]
    segmented = of("dense text ade20k").images(0)
    assert {found["test"].identity for found in sets} == {segmented["test"].identity}
    assert sets[0]["test annotations"].count == 0


def segment_png(change):
    def broken(root: Path) -> None:
        file = root / ADE / "ade20k_panoptic_val" / "ADE_val_00000003.png"
        pixels = np.asarray(Image.open(file)).copy()
        changed = change(pixels)
        file.unlink()
        if changed is not None:
            Image.fromarray(changed).save(file)

    return broken


def painted(pixels):
    pixels[30, 40] = (1, 2, 3)
    return pixels


def panoptic_json(change):
    def broken(root: Path) -> None:
        file = root / ADE / "ade20k_panoptic_val.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return broken


def segment(key, value):
    return panoptic_json(lambda found: found["annotations"][2]["segments_info"][1].update({key: value}))


PANOPTIC = {
    "png missing": (segment_png(lambda p: None), "ADE_val_00000003.png: is no readable image of segments"),
    "unknown segment": (segment_png(painted), "ADE_val_00000003.png: has the segment 197121, which"),
    "grey": (segment_png(lambda p: p[..., 0].copy()), "colour image"),
    "size": (segment_png(lambda p: p[:50].copy()), r"\(50, 96\), and .*json says \(64, 96\)"),
    "category": (segment("category_id", 150), "`category_id` 150, which is none of its `categories`"),
    "outside": (segment("bbox", [200, 3, 5, 5]), r"\[200, 3, 5, 5\] lies outside its image"),
    "no box": (segment("bbox", [1, 2, 3]), "four numbers"),
    "image": (panoptic_json(lambda f: f["annotations"][0].update(image_id="x")), "none of its `images`"),
    "no images": (panoptic_json(lambda f: f.pop("images")), "no usable `images`"),
    "no segments": (panoptic_json(lambda f: f["annotations"][1].pop("segments_info")), "`segments_info`"),
    "no category": (panoptic_json(lambda f: f.update(categories=[])), "0 categories"),
    "image missing": (
        lambda root: (root / ADE / "images/validation/ADE_val_00000002.jpg").unlink(),
        "ADE_val_00000002.jpg: there is no such file",
    ),
    "no json": (lambda root: (root / ADE / "ade20k_panoptic_val.json").write_text("{"), "readable JSON"),
}


@pytest.mark.parametrize("case", PANOPTIC)
def test_broken_panoptic_files_are_refused(tmp_path, of, case):
    ade20k(tmp_path, (("validation", 4),))
    break_it, message = PANOPTIC[case]
    break_it(tmp_path)
    with pytest.raises(DataError, match=message):
        of("goi zero-shot ade20k boxes", tmp_path).images(0)


def annotation(key, value):
    def broken(found):
        found["annotations"][1][key] = value

    return broken


INSTANCES = {
    "category": (annotation("category_id", 5), "`category_id` 5, which is none of its `categories`"),
    "image": (annotation("image_id", 5), "`image_id` 5, which is none of its `images`"),
    "outside": (annotation("bbox", [3, -20, 5, 10]), "lies outside its image"),
    "not a number": (annotation("bbox", [3, float("nan"), 5, 10]), "four numbers"),
    "polygon": (annotation("segmentation", [[1, "a"]]), "`segmentation` can not be read"),
    "run lengths": (annotation("segmentation", {"counts": [9, 9], "size": [3, 6]}), r"of size \(3, 6\), and"),
    "no mask": (lambda found: found["annotations"][0].pop("segmentation"), "no usable `segmentation`"),
    "twice": (lambda found: found["categories"][1].update(id=1), "3 categories with 2 different ids"),
    "size": (lambda found: found["images"][0].update(height=0), "height and width"),
    "empty": (lambda found: found.update(annotations=[]), "have no boxes"),
}


@pytest.mark.parametrize("case", INSTANCES)
def test_broken_instances_are_refused(data, tmp_path, of, case):
    found = json.loads((data / "coco/annotations/instances_val2017.json").read_text())
    INSTANCES[case][0](found)
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/val2017").symlink_to(data / "coco/val2017")
    (tmp_path / "coco/annotations/instances_val2017.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=INSTANCES[case][1]):
        of("goi zero-shot coco boxes", tmp_path)


def test_a_mask_that_covers_no_pixel_has_no_region():
    shape = {"segmentation": [[10.1, 10.1, 10.2, 10.1, 10.2, 10.2]]}
    assert regions._run_lengths(shape, SIZE, Path("a.json")) is None
    whole = regions._run_lengths(
        {"segmentation": {"counts": [64 * 96 - 5, 5], "size": [64, 96]}}, SIZE, Path("a")
    )
    assert mask_api.decode(whole)[-5:, -1].all() and mask_api.area(whole) == 5


def test_the_command_counts_no_images_of_the_fine_tuning(data, command):
    names = [f"goi {m} {of}" for m in ("zero-shot", "probe") for of in ("ade20k thing masks", "coco boxes")]
    names += ["goi probe ade20k stuff masks", "goi probe lvis thing masks", "goi probe objects365 boxes"]
    results, rows = command(data, ",".join(names))
    assert {name: row["in_domain"] for name, row in rows.items()} == {
        name: "coco" in name or "lvis" in name for name in names
    }
    outside = [row for row in rows.values() if not row["in_domain"]]
    [family] = results["families"]
    assert family["base"] == pytest.approx(np.mean([row["base"] for row in outside]), abs=1e-3)
    assert family["n"] == sum(row["n"] for row in outside) == 6 * 3 + 8
    assert all(row["base"] > 85 for name, row in rows.items() if "probe" in name)
