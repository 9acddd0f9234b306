"""Bad images are known before anything is computed; headers are read once."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from visft.data import register_own_data
from visft.data.datasets.catalog import OWN_TRAIN, check_data_set, check_registered
from visft.data.headers import SUFFIX, ImageRules
from visft.data.images import read_header
from visft.data.loader import build_test_loader, build_train_loader, load_records
from visft.errors import DataError

FAULTS = {
    "missing": (lambda f: f.unlink(), "the image is not there"),
    "broken": (lambda f: f.write_bytes(b"broken"), "the file is not an image"),
    "empty": (lambda f: f.write_bytes(b""), "the file is empty"),
    "of another size": (
        lambda f: Image.new("RGB", (50, 40)).save(f),
        "the image is 50 x 40, its annotations say",
    ),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "it is a folder"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_image_is_known_at_the_start(cfg, coco, kind, caplog) -> None:
    spoil, reason = FAULTS[kind]
    check_data_set(cfg, OWN_TRAIN)
    spoil(coco.images / "4.png")
    start = (
        f"{coco.json_file}: 1 of its 7 images cannot be used, the first: {coco.images / '4.png'}: {reason}"
    )
    with pytest.raises(DataError) as raised:
        check_data_set(cfg, OWN_TRAIN)
    assert str(raised.value).startswith(start) and "\n" not in str(raised.value)
    # Every kind can be passed over, with one sentence.
    cfg.DATALOADER.SKIP_BROKEN = True
    with caplog.at_level(logging.WARNING, logger="visft.data.headers"):
        check_data_set(cfg, OWN_TRAIN)
    said = [r.getMessage() for r in caplog.records if r.name == "visft.data.headers"]
    assert len(said) == 1 and "1 of its 7 images" in said[0] and "4.png" in said[0]
    seen = {sample["image_id"] for sample in next(build_train_loader(cfg, batch_size=7, seed=0))}
    assert seen == {1, 2, 3, 5, 6, 7}
    found = [batch[0]["image_id"] for batch in build_test_loader(cfg, "visft_own_test")]
    assert found == [1, 2, 3, 5, 6, 7]


def test_images_above_the_limit(cfg) -> None:
    cfg.VISFT.DATA.MAX_PIXELS = 40_000
    with pytest.raises(
        DataError, match=r"of its 7 images cannot be used, the first: .*VISFT.DATA.MAX_PIXELS"
    ):
        check_data_set(cfg, OWN_TRAIN)


@pytest.mark.parametrize("read_only", [False, True])
def test_headers_are_read_once(cfg, coco, monkeypatch, tmp_path, read_only) -> None:
    """Beside the annotations, or in the cache folder; a file that changes is read again, and no other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = coco.json_file.with_name(coco.json_file.name + SUFFIX)
    if read_only:
        kept.mkdir()  # nothing can take its place, also for root, who may write anywhere
    read = []
    monkeypatch.setattr(
        "visft.data.headers.read_header",
        lambda path, **limit: read.append(path) or read_header(path, **limit),
    )
    check_registered(OWN_TRAIN, train=True)
    assert len(read) == 7
    check_registered(OWN_TRAIN, train=True)
    assert len(read) == 7
    assert [file.parent.name for file in tmp_path.rglob("*.json") if "cache" in str(file)] == [
        "image-headers"
    ] * read_only
    (coco.images / "4.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="4.png"):
        check_registered(OWN_TRAIN, train=True)
    assert read[7:] == [str(coco.images / "4.png")]
    # What is not of these annotations, or not whole, is not believed.
    place = next((tmp_path / "cache").rglob("*.json")) if read_only else kept
    for text in (
        "",
        "[]",
        json.dumps({"annotations": "0", "images": {str(coco.images / "4.png"): [6, 0, 1, 1, 1]}}),
    ):
        place.write_text(text)
        with pytest.raises(DataError, match="4.png"):
            check_registered(OWN_TRAIN, train=True)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_sizes_that_do_not_tell_follow_those_that_do(cfg, coco, annotated) -> None:
    """An image turned by a half has one size in both frames; the one turned by a quarter says which is meant."""
    content = coco.content()
    half, quarter = coco.images / "1.png", coco.images / "2.png"
    exif = Image.Exif()
    pixels = {}
    for file, orientation, turns in ((half, 3, 2), (quarter, 6, 1)):
        stored = np.asarray(Image.open(file))
        exif[0x0112] = orientation
        Image.fromarray(stored).save(file, exif=exif)
        pixels[file] = stored if annotated == "stored" else np.rot90(stored, 2 if turns == 2 else -1)
        image = content["images"][int(file.stem) - 1]
        image["height"], image["width"] = pixels[file].shape[:2]
    content["annotations"] = [
        {**a, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 9, 1, 9, 9]]} for a in content["annotations"]
    ]
    coco.write(content)
    register_own_data(cfg)
    cfg.INPUT.MIN_SIZE_TEST = 0
    for batch, file in zip(build_test_loader(cfg, "visft_own_test"), (half, quarter), strict=False):
        assert np.array_equal(batch[0]["image"].permute(1, 2, 0).numpy(), pixels[file])


def test_records_of_no_file(coco) -> None:
    """A data set that a user registers by a function is checked too."""
    from detectron2.data import DatasetCatalog

    records = [
        {"file_name": str(coco.images / "1.png"), "image_id": 1},
        {"file_name": "no.png", "image_id": 2},
    ]
    DatasetCatalog.register("by_function", lambda: records)
    try:
        with pytest.raises(
            DataError, match="by_function: 1 of its 2 images .* no.png: the image is not there"
        ):
            load_records(("by_function",), train=False)
        assert len(load_records(("by_function",), train=False, rules=ImageRules(skip_broken=True))) == 2
    finally:
        DatasetCatalog.remove("by_function")


def test_lines_where_there_is_no_terminal(cfg, monkeypatch, capsys) -> None:
    monkeypatch.setattr("visft.utils.progress._LINE_SECONDS", 0.0)
    check_registered(OWN_TRAIN, train=True)
    lines = capsys.readouterr().err.splitlines()
    assert f"{OWN_TRAIN}: reading image headers: 7 of 7" in lines
