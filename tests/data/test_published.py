"""LVIS and Objects365: the names that come with detectron2 and visft, over small files in the published layouts."""

import copy
import json

import pytest
from coco_shapes import make_coco
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances
from detectron2.data.datasets.lvis import get_lvis_instances_meta

from visft import add_visft_config
from visft.data import ViSFTMapper, check_registered
from visft.data.datasets import objects365
from visft.data.datasets.coco import records_of
from visft.data.loader import load_records
from visft.errors import DataError
from visft.evaluation import HeadsEvaluator
from visft.evaluation.region_naming import RegionTextEvaluator

LVIS_IDS = {7: 12, 3: 5, 11: 1203}
"""Categories of the coloured shapes -> ids of LVIS v1."""


def lvis_content(coco, folder: str = "val2017") -> dict:
    """The shapes as LVIS would have them: polygons alone, images by COCO's address, what is known of each."""
    content = coco.content()
    categories = [
        {"id": LVIS_IDS[c["id"]], "name": c["name"], "frequency": f, "image_count": 5}
        for c, f in zip(content["categories"], "rcf", strict=True)
    ]
    images = [
        {k: image[k] for k in ("id", "width", "height")}
        | {"coco_url": f"http://images.cocodataset.org/{folder}/{image['file_name']}"}
        | {"neg_category_ids": [12], "not_exhaustive_category_ids": []}
        for image in content["images"]
    ]
    annotations = []
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        segmentation = a["segmentation"]
        if isinstance(segmentation, dict):
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        kept = {key: a[key] for key in ("id", "image_id", "bbox", "area")}
        annotations.append(kept | {"category_id": LVIS_IDS[a["category_id"]], "segmentation": segmentation})
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def lvis(tmp_path):
    """An LVIS v1 data set by a name of its own; a function that writes its file."""
    coco = make_coco(tmp_path / "coco")
    coco.images.rename(tmp_path / "coco" / "val2017")
    name, file = "lvis_v1_published_test", tmp_path / "lvis_v1_val.json"
    register_lvis_instances(name, get_lvis_instances_meta("lvis_v1"), str(file), f"{tmp_path}/coco/")
    content = lvis_content(coco)
    file.write_text(json.dumps(content))

    def write(change) -> str:
        body = copy.deepcopy(content)
        change(body)
        file.write_text(json.dumps(body))
        return name

    yield write
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def mapped(name: str) -> list[dict]:
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.VISFT.INPUT.AUGMENTATION = "fixed"
    mapper = ViSFTMapper(cfg, is_train=True)
    return [mapper(record) for record in load_records((name,), train=True)]


def test_lvis_is_read_as_it_is_published(lvis):
    name = lvis(lambda body: None)
    check_registered(name, train=False)
    images = mapped(name)
    assert len(images) == 7 and all(len(image["instances"]) == 3 for image in images)
    assert sorted(images[0]["instances"].gt_classes.tolist()) == sorted(i - 1 for i in LVIS_IDS.values())
    assert images[0]["instances"].has("gt_masks")
    evaluator = HeadsEvaluator(name, ("detection",))
    assert set(evaluator.metric.names) > {"APr", "APc", "APf"}


def test_records_are_those_of_detectron2s_reader(lvis):
    pytest.importorskip("lvis")
    name = lvis(lambda body: None)
    check_registered(name, train=True)
    assert records_of(name) == DatasetCatalog.get(name)


@pytest.mark.parametrize("size", [0, 2**24])
def test_big_files_of_boxes_alone_give_the_same_records(lvis, objects, monkeypatch, tmp_path, size):
    """Parsed by every process, or kept once a machine; a run for boxes has no use for LVIS's polygons."""
    monkeypatch.setattr("visft.data.datasets.packed.SMALL", size)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = lvis(lambda b: [a.pop("segmentation") for a in b["annotations"]]), objects(lambda body: None)
    RegionTextEvaluator(names[0], ("region_text",))
    records = load_records(names, train=True)
    assert isinstance(records, list) == (size > 0)
    records = list(records)
    classes = [{a["category_id"] for r in records[i : i + 7] for a in r["annotations"]} for i in (0, 7)]
    assert classes == [{4, 11, 1202}, {0, 92, 364}]
    assert not any(r["has_masks"] or "segmentation" in a for r in records for a in r["annotations"])
    assert records[0]["neg_category_ids"] == [12] and records[7]["file_name"].endswith(
        "objects365_v1_00000001.png"
    )


def test_boxes_that_lvis_is_published_with_are_no_fault(lvis):
    """Over the edge, or without area: the mapper clips the former, and drops the latter."""

    def change(body):
        body["annotations"][0]["bbox"][2] += 500
        body["annotations"][1].update(bbox=[3.0, 3.0, 0.0, 0.0], segmentation=[[3, 3, 3, 3, 3, 3]])

    images = mapped(lvis(change))
    assert len(images[0]["instances"]) == 2
    height, width = images[0]["instances"].image_size
    assert images[0]["instances"].gt_boxes.tensor[:, 2].max() <= width


LVIS_FAULTS = [
    (lambda b: b["images"][1].pop("coco_url"), True, ["image 2", "coco_url"]),
    (lambda b: b["images"][1].update(id=1), True, ["image id 1 occurs twice"]),
    (
        lambda b: b["images"][1].update(coco_url="http://x/val2017/none.png"),
        True,
        ["1 of its 7 images", "none.png"],
    ),
    (lambda b: b["images"][1].pop("neg_category_ids"), False, ["image 2", "neg_category_ids"]),
    (lambda b: b["images"][1].update(not_exhaustive_category_ids=[4]), False, ["image 2", "not_exhaustive"]),
    (lambda b: b["categories"][0].pop("frequency"), False, ["category 12", "frequency", "r, c or f"]),
    (lambda b: b["categories"].append({"id": 1204, "name": "x"}), True, ["category ids", "1203"]),
    (lambda b: b["categories"][0].update(id=5), True, ["category id 5 occurs twice"]),
    (lambda b: b["annotations"][4].update(category_id=6), True, ["annotation 104", "category_id 6"]),
    (lambda b: b["annotations"][4].update(image_id=77), True, ["annotation 104", "image_id 77"]),
    (lambda b: b["annotations"][4].update(id=100), True, ["annotation id 100 occurs twice"]),
    (lambda b: b["annotations"][4].update(area="9"), False, ["annotation 104", "area '9'"]),
    (lambda b: b["annotations"][4].update(bbox=[0, 0, float("nan"), 1]), True, ["annotation 104", "bbox"]),
    (lambda b: b["annotations"][4].update(segmentation=[[1, 2, 3, 4]]), True, ["annotation 104", "polygons"]),
    (
        lambda b: b["annotations"][4].update(segmentation={"size": [1, 1]}),
        True,
        ["annotation 104", "polygons"],
    ),
    (lambda b: b["annotations"].clear(), True, ["nothing to train on"]),
    (lambda b: b.pop("annotations"), True, ["`annotations` is missing"]),
    (lambda b: b["images"].clear(), False, ["empty"]),
]


@pytest.mark.parametrize(("change", "train", "words"), LVIS_FAULTS)
def test_what_is_wrong_with_an_lvis_file_is_named(lvis, change, train, words):
    name = lvis(change)
    with pytest.raises(DataError) as caught:
        check_registered(name, train=train)
    assert all(word in str(caught.value) for word in ["lvis_v1_val.json", *words]), str(caught.value)


def test_what_training_does_not_read_may_be_missing(lvis):
    def change(body):
        body["images"][1].pop("neg_category_ids")
        body["categories"][0].pop("frequency")
        body["annotations"][4].pop("area")

    check_registered(lvis(change), train=True)


def test_splits_without_annotations_can_be_tested_on(lvis):
    name = lvis(lambda body: body.pop("annotations"))
    check_registered(name, train=False)


# Objects365


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """The two splits over small files, images where the archives unpack them to; a function that writes the file."""
    root = tmp_path / "objects365"
    coco = make_coco(root / "made")
    content = coco.content()
    numbers = {7: 1, 3: 93, 11: 365}
    for image in content["images"]:
        source = coco.images / image["file_name"]
        target = root / "train" / f"patch{image['id']}" / f"objects365_v1_{image['id']:08d}.png"
        target.parent.mkdir(parents=True)
        source.rename(target)
        image["file_name"] = f"images/v1/patch{image['id']}/{target.name}"
    for annotation in content["annotations"]:
        annotation["category_id"] = numbers[annotation["category_id"]]
        del annotation["segmentation"]
    names = objects365.class_names()
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    objects365.register_objects365()
    file = root / "annotations" / "zhiyuan_objv2_train.json"
    file.parent.mkdir()

    def write(change) -> str:
        body = copy.deepcopy(content)
        change(body)
        file.write_text(json.dumps(body))
        return "objects365_v2_train"

    yield write
    monkeypatch.undo()
    objects365.register_objects365()


def test_objects365_has_365_classes():
    names = objects365.class_names()
    assert len(names) == len(set(names)) == 365 and all(name == name.strip() != "" for name in names)
    # Ids of the published file.
    known = {1: "Person", 6: "Car", 47: "Bicycle", 93: "Dog", 140: "Cat", 179: "Zebra", 250: "Parking meter"}
    known |= {300: "Tape Measur/ Ruler", 340: "French", 365: "Table Tennis"}
    assert {index: names[index - 1] for index in known} == known
    meta = MetadataCatalog.get("objects365_v2_val")
    assert meta.thing_classes == names
    assert meta.json_file.endswith("objects365/annotations/zhiyuan_objv2_val.json")


def test_objects365_is_read_as_it_is_published(objects):
    name = objects(lambda body: None)
    check_registered(name, train=False)
    images = mapped(name)
    assert len(images) == 7
    assert sorted(images[0]["instances"].gt_classes.tolist()) == [0, 92, 364]
    assert not images[0]["instances"].has("gt_masks")
    figures = HeadsEvaluator(name, ("detection",))
    assert figures._class_names()[92] == "Dog"


def test_images_that_objects365s_archives_lack_are_left_out(objects):
    def change(body):
        body["images"][0]["file_name"] = "images/v1/patch6/objects365_v1_00320532.jpg"

    name = objects(change)
    check_registered(name, train=True)
    assert [record["image_id"] for record in load_records((name,), train=True)] == [2, 3, 4, 5, 6, 7]


def test_another_image_that_is_not_there_is_named(objects):
    def change(body):
        body["images"][0]["file_name"] = "images/v1/patch6/objects365_v1_00320533.jpg"

    with pytest.raises(DataError, match=r"1 of its 7 images.*patch6/objects365_v1_00320533"):
        check_registered(objects(change), train=True)


def test_where_objects365_belongs_is_said(objects):
    with pytest.raises(DataError, match=r"objects365/annotations/zhiyuan_objv2_train\.json"):
        check_registered("objects365_v2_train", train=True)


def test_version_1_of_objects365_is_refused(objects):
    """Its ids stand for other classes, some of them above 365 in some files."""
    with pytest.raises(DataError, match="category ids"):
        check_registered(objects(lambda body: body["categories"][3].update(id=0)), train=True)
