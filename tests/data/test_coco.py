"""COCO files: what is broken is named, what is sound passes, own data needs no code."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from coco_shapes import make_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json as load_stock
from pycocotools import mask as mask_api

from visft.data import ViSFTMapper, check_data_set, register_own_data
from visft.data.datasets.catalog import check_coco_json
from visft.data.loader import load_records
from visft.data.masks import run_lengths_of
from visft.errors import ConfigError, DataError


def _annotation(content: dict, annotation_id: int) -> dict:
    return next(a for a in content["annotations"] if a["id"] == annotation_id)


def _set(annotation_id: int, **values):
    return lambda content: _annotation(content, annotation_id).update(values)


def _without(annotation_id: int, key: str):
    return lambda content: _annotation(content, annotation_id).pop(key)


def _counts(content: dict, change) -> None:
    # 103 is in an even image: run lengths.
    segmentation = _annotation(content, 103)["segmentation"]
    segmentation["counts"] = change(segmentation["counts"])


BROKEN = {
    "truncated JSON": (lambda c: json.dumps(c)[:-40], ["line 1", "JSON"]),
    "empty file": (lambda c: "", ["empty", "JSON"]),
    "a list": (lambda c: "[]", ["list", "images"]),
    "no images": (lambda c: c.pop("images") and None, ["`images` is missing"]),
    "no annotations": (lambda c: c.pop("annotations") and None, ["`annotations` is missing"]),
    "no categories": (lambda c: c.pop("categories") and None, ["`categories` is missing"]),
    "annotations is an object": (lambda c: c.update(annotations={}), ["`annotations` is a dict"]),
    "empty categories": (lambda c: c.update(categories=[]), ["`categories` is empty"]),
    "category id twice": (lambda c: c["categories"].append(c["categories"][0]), ["category id 7", "twice"]),
    "category without name": (lambda c: c["categories"][1].pop("name") and None, ["category 3", "`name`"]),
    "empty data set": (lambda c: c.update(images=[], annotations=[]), ["empty"]),
    "nothing but crowds": (
        lambda c: [a.update(iscrowd=1) for a in c["annotations"]] and None,
        ["nothing to train"],
    ),
    "image id twice": (lambda c: c["images"].append(c["images"][2]), ["image id 3", "twice"]),
    "image without width": (lambda c: c["images"][1].pop("width") and None, ["image 2", "`width`"]),
    "image of no height": (lambda c: c["images"][1].update(height=0), ["image 2", "height 0", "above 0"]),
    "annotation without id": (lambda c: c["annotations"][4].pop("id") and None, ["annotations[4]", "`id`"]),
    "annotation is a text": (lambda c: c["annotations"].insert(2, "x"), ["annotations[2]", "str"]),
    "annotation id twice": (_set(101, id=100), ["annotation id 100", "twice"]),
    "annotation without box": (_without(105, "bbox"), ["annotation 105", "`bbox`"]),
    "annotation without category": (_without(105, "category_id"), ["annotation 105", "`category_id`"]),
    "annotation without image_id": (_without(105, "image_id"), ["annotation 105", "`image_id`"]),
    "unknown image": (_set(105, image_id=999), ["annotation 105", "999", "images"]),
    "unknown category": (_set(105, category_id=5), ["annotation 105", "category_id 5", "3, 7, 11"]),
    "category as text": (_set(105, category_id="7"), ["annotation 105", "category_id '7'", "whole number"]),
    "three numbers": (_set(105, bbox=[1, 2, 3]), ["annotation 105", "[1, 2, 3]", "four"]),
    "box of NaN": (_set(105, bbox=[1, 2, float("nan"), 4]), ["annotation 105", "nan", "four finite"]),
    "box of endless numbers": (_set(105, bbox=[1, 2, 10**400, 4]), ["annotation 105", "four finite"]),
    "box outside": (_set(105, bbox=[190, 10, 2000, 10]), ["annotation 105", "out of its image"]),
    "box left of the picture": (_set(105, bbox=[-5, 10, 20, 10]), ["annotation 105", "5 px out"]),
    "box without width": (_set(105, bbox=[10, 10, 0, 5]), ["annotation 105", "without area"]),
    "corners for sizes": (_set(105, bbox=[50, 60, -10, 5]), ["annotation 105", "without area"]),
    "iscrowd of 2": (_set(105, iscrowd=2), ["annotation 105", "iscrowd 2"]),
    "ignore": (_set(105, ignore=1), ["annotation 105", "`ignore`"]),
    "polygon of two points": (_set(100, segmentation=[[1, 2, 3, 4]]), ["annotation 100", "three points"]),
    "polygon of odd length": (_set(100, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ["annotation 100", "odd"]),
    "polygon of texts": (_set(100, segmentation=[["a", "b"] * 3]), ["annotation 100", "numbers"]),
    "polygon of NaN": (
        _set(100, segmentation=[[1, 2, 3, float("nan"), 5, 6]]),
        ["annotation 100", "numbers"],
    ),
    "polygon of endless": (_set(100, segmentation=[[1, 2, 3, 10**400, 5, 6]]), ["annotation 100", "numbers"]),
    "polygon not nested": (_set(100, segmentation=[1, 2, 3, 4, 5, 6]), ["annotation 100", "numbers"]),
    "mask is a text": (_set(100, segmentation="mask.png"), ["annotation 100", "str"]),
    "mask of another size": (
        lambda c: _annotation(c, 103)["segmentation"].update(size=[5, 5]),
        ["annotation 103", "[5, 5]"],
    ),
    "run lengths cut off": (lambda c: _counts(c, lambda s: s[:-2]), ["annotation 103", "decode"]),
    "run lengths of other letters": (
        lambda c: _counts(c, lambda s: "~é" + s),
        ["annotation 103", "run lengths"],
    ),
    "run lengths too long": (lambda c: _counts(c, lambda s: [9, 10**7]), ["annotation 103", "10000009"]),
    "negative run lengths": (lambda c: _counts(c, lambda s: [-9, 10]), ["annotation 103", "run lengths"]),
    "one without mask": (
        _without(105, "segmentation"),
        ["annotation 105", "no segmentation", "annotation 100"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(coco, case: str) -> None:
    change, expected = BROKEN[case]
    content = coco.content()
    changed = change(content)
    coco.write(changed if isinstance(changed, str) else content)
    with pytest.raises(DataError) as raised:
        check_coco_json(str(coco.json_file), train=True)
    message = str(raised.value)
    assert message.startswith(str(coco.json_file)) and "\n" not in message
    assert not [word for word in expected if word not in message], message


def test_sound_files_pass(coco) -> None:
    content = coco.content()
    height, width = content["images"][1]["height"], content["images"][1]["width"]
    _annotation(content, 100)["bbox"] = [-0.4, 0, 50, 50]
    _annotation(content, 100)["segmentation"].append([1, 1, 2, 2])  # a sliver beside a whole polygon
    # Uncompressed run lengths, as COCO's crowds have.
    crowd = {"size": [height, width], "counts": [10, 20, height * width - 30]}
    _annotation(content, 103).update(iscrowd=1, segmentation=crowd)
    content["images"][6]["id"] = 70  # image without annotations
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 7]
    coco.write(content)
    for train in (True, False):
        summary = check_coco_json(str(coco.json_file), train=train)
        assert summary.classes == ("green", "red", "blue") and summary.category_ids == (3, 7, 11)


def test_boxes_alone_are_sound_too(coco) -> None:
    content = coco.content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    coco.write(content)
    check_coco_json(str(coco.json_file), train=True)


def test_areas_are_computed_where_they_are_missing_and_else_read_by_evaluation_alone(coco) -> None:
    content = coco.content()
    del _annotation(content, 104)["area"]
    _annotation(content, 105).update(area=None, iscrowd=None)
    coco.write(content)
    for train in (True, False):
        check_coco_json(str(coco.json_file), train=train)
    _annotation(content, 104)["area"] = float("nan")
    coco.write(content)
    check_coco_json(str(coco.json_file), train=True)
    with pytest.raises(DataError, match="annotation 104 has area nan"):
        check_coco_json(str(coco.json_file), train=False)


@pytest.mark.parametrize("mask", [None, [], [[]], [[5, 5, 9, 9]]], ids=str)
def test_masks_are_required_where_they_are_learned(cfg, coco, mask) -> None:
    content = coco.content()
    _annotation(content, 105)["segmentation"] = mask
    coco.write(content)
    for heads in (("detection", "segmentation"), ("segmentation",)):
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.VISFT.HEADS = "ViSFT", heads
        for name in ("visft_own_train", "visft_own_test"):
            with pytest.raises(DataError, match="annotation 105 has .* annotation 100 has a mask"):
                check_data_set(cfg, name)
    cfg.MODEL.VISFT.HEADS = ("detection", "region_text")
    for name in ("visft_own_train", "visft_own_test"):
        check_data_set(cfg, name)
    # Boxes alone are used then, of all annotations.
    records = load_records(("visft_own_train",), train=True)
    mapped = ViSFTMapper(augmentations=[], is_train=True)
    instances = [mapped(record)["instances"] for record in records]
    assert [len(i) for i in instances] == [3] * 7 and not any(i.has("gt_masks") for i in instances)


def test_files_as_tools_write_them(cfg, coco) -> None:
    """A byte order mark, Windows' line ends, ids of any kind: the records are otherwise the same."""
    check_data_set(cfg, "visft_own_train")
    plain = DatasetCatalog.get("visft_own_train")
    assert plain == load_stock(str(coco.json_file), str(coco.images), "visft_own_train")
    content = coco.content()
    ids = {1: "one", 2: 2**64, 3: -3, 4: 0, 5: "5", 6: 5, 7: 10**40}
    for image in content["images"]:
        image["id"] = ids[image["id"]]
    for number, annotation in enumerate(content["annotations"]):
        annotation |= {"id": number if number % 2 else f"a{number}", "image_id": ids[annotation["image_id"]]}
    coco.json_file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content, indent=1).replace("\n", "\r\n").encode())
    check_data_set(cfg, "visft_own_train")
    found = load_records(("visft_own_train",), train=True)
    assert [record["image_id"] for record in found] == list(ids.values())
    for record, other in zip(found, plain, strict=True):
        assert {key: record[key] for key in other} == other | {"image_id": record["image_id"]}


def test_a_file_is_read_again_only_when_it_changed(coco) -> None:
    arguments = (str(coco.json_file),)
    first = check_coco_json(*arguments, train=True)
    assert check_coco_json(*arguments, train=True) is first
    content = coco.content()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    coco.write(content)
    with pytest.raises(DataError, match="annotation 100"):
        check_coco_json(*arguments, train=True)


def test_compressed_run_lengths_are_read_as_pycocotools_reads_them() -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.03, 0.5, 1.0):
        mask = (rng.random((61, 47)) < density).astype(np.uint8)
        flat = mask.T.reshape(-1)
        # Counted by hand: alternating runs of 0 and 1, beginning with 0.
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        assert run_lengths_of(mask_api.encode(np.asfortranarray(mask))["counts"].decode()) == runs


def test_own_data_fills_the_metadata(cfg, coco) -> None:
    assert cfg.DATASETS.TRAIN == ("visft_own_train",) and cfg.DATASETS.TEST == ("visft_own_test",)
    for name in ("visft_own_train", "visft_own_test"):
        check_data_set(cfg, name)
        meta = MetadataCatalog.get(name)
        assert meta.thing_classes == ["green", "red", "blue"]
        assert meta.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 11: 2}
        assert len(DatasetCatalog.get(name)) == 7
    # Another file under the same keys, in the same process.
    content = coco.content()
    content["categories"].append({"id": 12, "name": "white"})
    coco.write(content)
    cfg.freeze()
    register_own_data(cfg)
    check_data_set(cfg, "visft_own_train")
    assert cfg.is_frozen() and MetadataCatalog.get("visft_own_train").thing_classes[-1] == "white"


def test_own_data_by_half(cfg) -> None:
    cfg.VISFT.DATA.TRAIN_IMAGES = ""
    with pytest.raises(ConfigError, match="VISFT.DATA.TRAIN_IMAGES is not"):
        register_own_data(cfg)


def test_own_training_data_alone_leaves_nothing_to_evaluate_on(cfg) -> None:
    cfg.VISFT.DATA.TEST_JSON = cfg.VISFT.DATA.TEST_IMAGES = ""
    cfg.DATASETS.TEST = ("coco_2017_val",)
    register_own_data(cfg)
    assert cfg.DATASETS.TEST == ()


def test_own_data_that_is_not_there(cfg, coco) -> None:
    coco.json_file.unlink()
    with pytest.raises(DataError, match="VISFT.DATA.TRAIN_JSON"):
        check_data_set(cfg, "visft_own_train")


def test_test_set_with_other_classes(cfg, coco, tmp_path) -> None:
    content = coco.content()
    content["categories"][1]["name"] = "lime"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    cfg.VISFT.DATA.TEST_JSON = str(other)
    register_own_data(cfg)
    check_data_set(cfg, "visft_own_train")
    with pytest.raises(DataError, match="cannot be matched by name.*it has lime"):
        check_data_set(cfg, "visft_own_test")


def test_unknown_name_says_the_nearest(cfg) -> None:
    cfg.DATASETS.TRAIN = ("coco_2017_trian",)
    with pytest.raises(DataError, match="did you mean `coco_2017_train`"):
        check_data_set(cfg, "coco_2017_trian")


STOCK = """
import json, sys
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
import visft
from visft.data import build_train_loader, check_data_set, register_all
from visft.errors import DataError
register_all()
cfg = get_cfg()
visft.add_visft_config(cfg)
cfg.DATALOADER.NUM_WORKERS = 0
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
check_data_set(cfg, "coco_2017_train")
(batch,) = (next(build_train_loader(cfg, batch_size=3, seed=0)),)
found = {s["image_id"]: [s["instances"].gt_classes.tolist(), s.get("captions")] for s in batch}
try:
    check_data_set(cfg, "coco_2017_val")
except DataError as error:
    print(json.dumps([found, str(error)]))
"""


def test_stock_names_find_coco_below_detectron2_datasets(tmp_path) -> None:
    """In a process of its own: detectron2 reads DETECTRON2_DATASETS when it is imported."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    made = make_coco(tmp_path / "made", count=3, categories=things)
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    made.json_file.rename(annotations / "instances_train2017.json")
    made.images.rename(tmp_path / "coco" / "train2017")
    captions = [
        {"id": 1, "image_id": 2, "caption": "a triangle"},
        {"id": 2, "image_id": 2, "caption": "another"},
    ]
    (annotations / "captions_train2017.json").write_text(json.dumps({"images": [], "annotations": captions}))
    env = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STOCK], env=env, capture_output=True, text=True, check=True)
    found, missing = json.loads(done.stdout.splitlines()[-1])
    # COCO's ids 7, 3, 11 are its classes 6, 2 and 10 of 80.
    assert {k: sorted(v[0]) for k, v in found.items()} == {"1": [2, 6, 10], "2": [2, 6, 10], "3": [2, 6, 10]}
    assert found["2"][1] == ["a triangle", "another"] and found["1"][1] is None
    assert "coco/annotations/instances_val2017.json" in missing and "DETECTRON2_DATASETS" in missing
