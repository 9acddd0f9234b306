"""Segmentation of the real suite, on tiny sets that lie on disk as the true ones do."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import by_names
from PIL import Image
from sklearn.metrics import jaccard_score

from towerbench import segmentation
from towerbench.errors import DataError
from towerbench.real import dense, maps

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))


def blocks(seed: int, values, size=(64, 96)) -> tuple[np.ndarray, np.ndarray]:
    """An image of four parts of a colour each, and its values."""
    rng = np.random.default_rng(seed)
    order, (height, width) = rng.permutation(len(values)), size
    row, column = rng.integers(height // 4, 3 * height // 4), rng.integers(width // 4, 3 * width // 4)
    which = np.zeros(size, int)
    which[row:], which[:, column:] = 2, which[:, column:] + 1
    which[row:, column:] = 3
    which = order[which % len(values)]
    noise = rng.integers(-20, 20, (*size, 3))
    return np.clip(np.array(COLOURS)[which] + noise, 0, 255).astype(np.uint8), np.array(values)[which]


def write(root: Path, images: str, labels: str, name: str, seed: int, values, palette=False) -> None:
    pixels, values = blocks(seed, values, (64 + seed % 10, 96))
    for folder in (images, labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / images / f"{name}.jpg", quality=95)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:  # as VOC's: indices of colours
        image.putpalette([(i * 37) % 256 for i in range(768)])
    image.save(root / labels / f"{name}.png")


def devkit(root: Path, lists: str, labels: str, values, palette: bool) -> None:
    (root / "ImageSets" / lists).mkdir(parents=True)
    for split, count in (("train", 10), ("val", 4)):
        names = [f"2007_{split}{i:03d}" for i in range(count)]
        (root / "ImageSets" / lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            write(root, "JPEGImages", labels, name, i + 20 * (split == "val"), values, palette)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    for split, count in (("training", 10), ("validation", 4)):
        for i in range(count):
            write(
                root / "ADEChallengeData2016",
                f"images/{split}",
                f"annotations/{split}",
                f"ADE_{'train' if split == 'training' else 'val'}_{i + 1:08d}",
                i + 20 * (split == "validation"),
                (0, 1, 13, 150),
            )
    devkit(root / "VOCdevkit/VOC2012", "Segmentation", "SegmentationClass", (0, 15, 20, 255), True)
    devkit(
        root / "VOCdevkit/VOC2010", "SegmentationContext", "SegmentationClassContext", (0, 1, 2, 59), False
    )
    return root


def files(data: Path, name: str) -> list[Path]:
    """The label maps that are tested."""
    folder = {
        "ade20k": "ADEChallengeData2016/annotations/validation",
        "voc2012": "VOCdevkit/VOC2012/SegmentationClass",
        "pascal-context": "VOCdevkit/VOC2010/SegmentationClassContext",
    }[name]
    return sorted(file for file in (data / folder).iterdir() if "val" in file.name)


CLASSES = {
    # By set: words of every class, and what a value in its files means, `None` for nothing.
    "ade20k": (150, lambda v: None if v == 0 else v - 1),
    "voc2012": (20, lambda v: None if v in (0, 255) else v - 1),
    "pascal-context": (59, lambda v: None if v == 0 else v - 1),
}


@pytest.mark.parametrize("name", CLASSES)
def test_patches_against_names_is_scikit_learns_jaccard(store, data, run, name):
    benchmark, found = run(f"dense text {name}")
    classes, meaning = CLASSES[name]
    assert len(benchmark.names) == classes and found.shape == (4, 2 * classes)
    texts = by_names(store, benchmark.names, maps.TEMPLATES)
    told, true = [], []
    for cells, file in zip(store.dense(benchmark.images(0)["test"]), files(data, name), strict=True):
        values = np.asarray(Image.open(file))
        scores = (store.project(cells.permute(1, 2, 0)) @ texts.T).permute(2, 0, 1)[None]
        fine = F.interpolate(scores, values.shape, mode="bilinear", align_corners=False)
        kept = np.vectorize(lambda v: meaning(v) is not None)(values)
        told.append(fine[0].argmax(0).numpy()[kept])
        true.append(np.vectorize(meaning, otypes=[int])(np.where(kept, values, 1))[kept])
    told, true = np.concatenate(told), np.concatenate(true)
    present = sorted({*told.tolist(), *true.tolist()})
    expected = jaccard_score(true, told, labels=present, average="macro")
    assert float(benchmark.figure(found.mean(0))) == pytest.approx(expected, abs=1e-9)


def test_ious_are_those_of_detectron2(data, tmp_path):
    """Predictions drawn at random, of images larger than what is compared at once: an estimate within a point."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    names, rng = [f"class {i}" for i in range(5)], np.random.default_rng(0)
    records, ours, told = [], [], []
    for number, (size, share) in enumerate((((700, 520), 0.9), ((300, 410), 0.5), ((90, 200), 0.2))):
        truth = np.kron(rng.integers(0, 6, (10, 10)), np.ones((70, 52), int))[: size[0], : size[1]]
        predicted = np.where(
            rng.random(truth.shape) < share, np.minimum(truth, 4), rng.integers(0, 5, truth.shape)
        )
        truth = np.where(truth == 5, 255, truth).astype(np.uint8)
        file = tmp_path / f"{number}.png"
        Image.fromarray(truth).save(file)
        records.append({"file_name": str(number), "sem_seg_file_name": str(file)})
        labels, weight = dense.compared(truth)
        at = segmentation.sampled(predicted, *labels.shape)
        ours.append(weight * segmentation.overlaps(at, labels, 5).double())
        told.append({"sem_seg": F.one_hot(torch.from_numpy(predicted), 5).permute(2, 0, 1)})
    DatasetCatalog.register("test_real_dense", lambda: records)
    MetadataCatalog.get("test_real_dense").set(stuff_classes=names, ignore_label=255)
    try:
        evaluator = SemSegEvaluator(
            "test_real_dense",
            distributed=False,
            sem_seg_loading_fn=lambda name, dtype: np.asarray(Image.open(name)).astype(dtype),
        )
        evaluator.reset()
        evaluator.process(records, told)
        expected = evaluator.evaluate()["sem_seg"]
    finally:
        DatasetCatalog.remove("test_real_dense")
        MetadataCatalog.remove("test_real_dense")
    means = torch.stack(ours).mean(0).numpy()
    assert 100 * float(segmentation.mean_iou(means)) == pytest.approx(expected["mIoU"], abs=0.5)
    whole = segmentation.overlaps(torch.from_numpy(predicted), torch.from_numpy(truth.astype(np.int64)), 5)
    np.testing.assert_array_equal(whole.numpy(), ours[-1].numpy())  # the last is small: all its pixels count


@pytest.mark.parametrize("name", CLASSES)
def test_a_probe_learns_what_colours_mean(run, name):
    benchmark, found = run(f"dense probe {name}")
    assert len(benchmark.parts["train"].files) == 8 and len(benchmark.parts["validation"].files) == 2
    assert not set(benchmark.parts["train"].sources) & set(benchmark.test.sources)
    union = found.sum(0)[benchmark.classes :]
    there = {"ade20k": [0, 12, 149], "voc2012": [14, 19, 20], "pascal-context": [0, 1, 58]}[name]
    assert np.flatnonzero(union).tolist() == there  # nothing else was learned; VOC's background is the last
    assert float(benchmark.figure(found.mean(0))) > 0.7


def test_shuffled_maps_are_not_told(store, of, monkeypatch):
    """The figure is of this image's own cells."""
    benchmark = of("dense probe ade20k")
    images = benchmark.images(0)
    readout = benchmark.readout(store, images)
    monkeypatch.setattr(benchmark, "readout", lambda *_: readout)
    right = benchmark.figure(benchmark.items(store, images, 0).mean(0))
    labels = dense.Labelled.labels
    monkeypatch.setattr(dense.Labelled, "labels", lambda self, i: labels(self, i)[::-1, ::-1])
    wrong = benchmark.figure(benchmark.items(store, images, 0).mean(0))
    assert wrong < 0.5 * right


def test_cells_that_a_probe_trains_on():
    labels = np.full((32, 32), 3, np.uint8)
    labels[:16, :16], labels[:16, 16:] = dense.IGNORED, 7
    grid = dense.cell_labels(labels, (8, 8))
    assert grid[:4, :4].eq(dense.IGNORED).all() and grid[4:].eq(3).all() and grid[:4, 4:].eq(7).all()
    places = dense.chosen(5, grid.flatten())
    found = grid.flatten()[places].tolist()
    assert len(set(places)) == dense.CELLS and dense.IGNORED not in found and set(found[:2]) == {3, 7}
    assert (dense.chosen(5, grid.flatten()) == places).all()
    many = torch.arange(40)
    assert len(set(dense.chosen(0, many))) == 12 and dense.chosen(0, many).max() > 12


def test_class_names():
    assert len(dense.VOC) == 20 and len(dense.CONTEXT) == 59 and list(dense.CONTEXT) == sorted(dense.CONTEXT)
    names = dense.DATA_SETS["ade20k"].names()
    assert names[43] == ("signboard", "sign") and names[8] == ("window",) and len(names) == 150
    assert maps.words("Cabinet/shelf") == ("cabinet", "shelf") and maps.words("water_bottle") == (
        "water bottle",
    )
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

    assert dense._ade20k_names() == [maps.words(name) for name in ADE20K_SEM_SEG_CATEGORIES]


def test_images_of_one_set_pass_a_tower_once(of):
    probe, text = (of(f"dense {kind} ade20k") for kind in ("probe", "text"))
    assert probe.images(0)["test"].identity == text.images(0)["test"].identity
    assert probe.images(0)["test label maps"].count == 0


def test_changed_maps_are_evaluated_anew(data, of):
    benchmark = of("dense text voc2012")
    before = benchmark.images(0)["test label maps"].key
    os.utime(files(data, "voc2012")[0], (1, 1))
    after = of("dense text voc2012").images(0)
    assert after["test label maps"].key != before
    assert after["test"].identity == benchmark.images(0)["test"].identity


BROKEN = {
    "no map": (lambda f: f.unlink(), "no readable label map"),
    "no png": (lambda f: f.write_bytes(b"nothing"), "no readable label map"),
    "colours": (lambda f: Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(f), "one 8-bit label a pixel"),
    "label": (lambda f: Image.fromarray(np.full((8, 8), 60, np.uint8)).save(f), "label 60; 0 to 59 were"),
    "size": (lambda f: Image.fromarray(np.zeros((8, 8), np.uint8)).save(f), r"\(8, 8\), and its image of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_maps_are_refused(tmp_path, of, case):
    root = tmp_path / "VOCdevkit/VOC2010"
    devkit(root, "SegmentationContext", "SegmentationClassContext", (0, 1, 2, 59), False)
    change, message = BROKEN[case]
    change(root / "SegmentationClassContext" / "2007_val001.png")
    with pytest.raises(DataError, match=f"2007_val001.png.*{message}"):
        of("dense text pascal-context", tmp_path)


def test_broken_lists_and_images_are_refused(tmp_path, of):
    root = tmp_path / "VOCdevkit/VOC2012"
    devkit(root, "Segmentation", "SegmentationClass", (0, 1, 20, 255), True)
    lists = root / "ImageSets" / "Segmentation"
    (tmp_path / "ADEChallengeData2016/images/validation").mkdir(parents=True)
    for break_it, name, message in (
        (
            (root / "JPEGImages" / "2007_val002.jpg").unlink,
            "text voc2012",
            "val002.jpg: is no readable image",
        ),
        (lambda: (lists / "val.txt").write_text("\n"), "text voc2012", "val.txt: names no images"),
        ((lists / "val.txt").unlink, "text voc2012", "val.txt: is no readable text"),
        (lambda: (lists / "val.txt").write_text("2007_val000"), "text ade20k", "validation: holds no images"),
        (
            lambda: (lists / "train.txt").write_text("2007_train000"),
            "probe voc2012",
            "2007_train000.png: 1 images are to train on; at least 5",
        ),
    ):
        break_it()
        with pytest.raises(DataError, match=message):
            of(f"dense {name}", tmp_path)


def test_the_command_measures_all_three_sets(data, command):
    names = [f"dense {kind} {name}" for kind in ("probe", "text") for name in CLASSES]
    _, rows = command(data, ",".join(names))
    assert set(rows) == set(names)
    for name, row in rows.items():
        assert row["n"] == 4 and not row["in_domain"] and (row["base"] > 70 or "text" in name)
