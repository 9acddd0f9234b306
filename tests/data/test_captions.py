"""Captions as data: what is broken is named, which records get them, own data, mirrored images, vocabularies."""

import json

import processes
import pytest
from coco_shapes import CATEGORIES
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T

from visft import add_visft_config
from visft.data import ViSFTMapper, register_own_data
from visft.data.caption_vocabulary import build_vocabulary
from visft.data.datasets.captions import captions_of, check_captions, load_captioned, read_captions
from visft.data.datasets.catalog import OWN_TRAIN, check_registered
from visft.data.loader import load_records
from visft.data.mapper import mirror
from visft.errors import ConfigError, DataError
from visft.modeling.heads import Vocabulary

COLOURS = [category["name"] for category in CATEGORIES]


def caption_file(coco, *, skip: tuple[int, ...] = ()) -> dict:
    """Two captions for each image of the small data set, but for those to skip."""
    images = coco.content()["images"]
    annotations = []
    for image in images:
        if image["id"] not in skip:
            for text in (f"Three shapes in image {image['id']}", "green on the left, blue on the right."):
                annotations.append({"id": len(annotations), "image_id": image["id"], "caption": text})
    return {"images": images, "annotations": annotations}


@pytest.fixture
def file(coco):
    path = coco.json_file.with_name("captions.json")
    path.write_text(json.dumps(caption_file(coco, skip=(2, 5))))
    return path


@pytest.fixture
def own(cfg, file):
    """The small data set with captions for all but two images."""
    cfg.VISFT.DATA.TRAIN_CAPTIONS = str(file)
    register_own_data(cfg)
    return cfg


BROKEN = {
    "cut off": (lambda c: json.dumps(c)[:-30], "broken in line 1.*JSON"),
    "empty file": (lambda c: "", "empty.*JSON"),
    "a list": (lambda c: "[]", "holds a list.*`images` and `annotations`"),
    "no annotations": (lambda c: c.pop("annotations") and None, "`annotations` is missing"),
    "annotations is an object": (lambda c: c.update(annotations={}), "`annotations` is a dict"),
    "annotation is a text": (lambda c: c["annotations"].insert(2, "x"), r"annotations\[2\] is a str"),
    "no caption": (lambda c: c["annotations"][3].pop("caption") and None, "annotation 3.*caption None"),
    "caption is a list": (lambda c: c["annotations"][3].update(caption=["a"]), r"annotation 3.*\['a'\]"),
    "no image_id": (lambda c: c["annotations"][4].pop("image_id") and None, "annotation 4.*image_id None"),
    "image_id of a number with a point": (
        lambda c: c["annotations"][4].update(image_id=1.5),
        "annotation 4.*1.5",
    ),
    "of other pictures": (
        lambda c: [a.update(image_id=a["image_id"] + 1000) for a in c["annotations"]] and None,
        "none of its 5 image ids",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(own, coco, file, change, message):
    content = caption_file(coco, skip=(2, 5))
    text = change(content)
    file.write_text(text if text is not None else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        check_captions(OWN_TRAIN)
    assert str(file) in str(caught.value)


def test_records_get_their_captions(own):
    assert check_captions(OWN_TRAIN) == 5
    records = load_records((OWN_TRAIN,), train=True)
    assert {r["image_id"]: len(r["captions"]) for r in records} == {
        i: 0 if i in (2, 5) else 2 for i in range(1, 8)
    }
    mapped = [ViSFTMapper(own)(record) for record in records]
    assert ["captions" in m for m in mapped] == [r["image_id"] not in (2, 5) for r in records]
    assert all("instances" in m for m in mapped)


def test_a_file_is_read_again_when_it_has_changed(file, coco):
    assert len(read_captions(str(file))) == 5
    file.write_text(json.dumps(caption_file(coco)))
    assert len(read_captions(str(file))) == 7


def test_own_captions_that_are_not_there(own, file):
    file.unlink()
    with pytest.raises(DataError, match="captions.json is not there.*VISFT.DATA.TRAIN_CAPTIONS"):
        check_registered(OWN_TRAIN, train=True)


def test_captions_alone_are_a_data_set(cfg, coco, file):
    data = cfg.VISFT.DATA
    data.TRAIN_JSON = data.TEST_JSON = data.TEST_IMAGES = ""
    data.TRAIN_CAPTIONS = str(file)
    register_own_data(cfg)
    check_registered(OWN_TRAIN, train=True)
    records = load_records((OWN_TRAIN,), train=True, filter_empty=True)
    assert len(records) == 7 and all("annotations" not in record for record in records)
    mapped = ViSFTMapper(cfg)(records[0])
    assert "instances" not in mapped and len(mapped["captions"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].pop("file_name"), "image 2 lacks"),
        (lambda c: c["images"][1].pop("id"), r"images\[1\] lacks"),
        (lambda c: c.pop("images"), "`images` is missing"),
    ],
)
def test_images_of_a_caption_file_are_checked(coco, file, change, message):
    content = caption_file(coco)
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_captioned(str(file), str(coco.images))


def test_captions_without_images_are_refused():
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.VISFT.DATA.TRAIN_CAPTIONS = "captions.json"
    with pytest.raises(ConfigError, match="TRAIN_CAPTIONS is set and VISFT.DATA.TRAIN_IMAGES is not"):
        register_own_data(cfg)


def test_coco_and_the_demo_world_know_where_their_captions_are():
    for name, end in {
        "coco_2017_train": "annotations/captions_train2017.json",
        "coco_2014_val": "annotations/captions_val2014.json",
        "visft_demo_val": "annotations/captions_val.json",
    }.items():
        assert MetadataCatalog.get(name).caption_json.endswith(end), name


def test_a_data_set_may_be_without_its_captions(own, file):
    file.unlink()
    assert captions_of(OWN_TRAIN) == {}
    assert check_captions(OWN_TRAIN) == 0


def test_records_may_bring_their_own():
    DatasetCatalog.register(
        "captions_by_code", lambda: [{"image_id": 4, "captions": ["a cat"]}, {"image_id": 5}]
    )
    try:
        assert captions_of("captions_by_code") == {4: ["a cat"]}
        assert check_captions("captions_by_code") == 1
    finally:
        DatasetCatalog.remove("captions_by_code")


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a dog to the left of a cat", "a dog to the right of a cat"),
        ("Right: the leftmost dog", "left: the rightmost dog"),
        ("a bright leftover", "a bright leftover"),
        ("left-handed, right?", "right-handed, left?"),
    ],
)
def test_sides_change_places_in_the_caption_of_a_mirrored_image(caption, mirrored):
    assert mirror(caption) == mirrored
    assert mirror(mirrored).lower() == caption.lower()


def test_captions_follow_the_image(own, coco):
    record = load_records((OWN_TRAIN,), train=True)[0]
    for flips, words in (
        ([], "green on the left, blue on the right."),
        ([T.HFlipTransform], "green on the right, blue on the left."),
        ([T.HFlipTransform] * 2, "green on the left, blue on the right."),
    ):
        mapper = ViSFTMapper(augmentations=[kind(record["width"]) for kind in flips], is_train=True)
        mapped = mapper(record)
        assert mapped["captions"][1] == words
        green = 1 if words.startswith("green on the left") else -1
        # The image says so itself: its categories are in the order of their columns.
        first, last = (
            mapped["image"][:, :, : record["width"] // 3],
            mapped["image"][:, :, -record["width"] // 3 :],
        )
        assert green * (int(first[0].max()) - int(last[0].max())) > 0


def test_a_vocabulary_of_several_sources(own, coco, file, tmp_path):
    words = build_vocabulary([OWN_TRAIN], 5)
    assert words.words[1:-3] == (
        "on",
        "the",
        "blue",
        "green",
        "image",
        "in",
        "left",
        "right",
        "shapes",
        "three",
    )
    more = tmp_path / "more.json"
    more.write_text(
        json.dumps({"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "zebra " * 20}]})
    )
    assert build_vocabulary([str(file), str(more)], 5).words[1] == "zebra"
    with pytest.raises(DataError, match="no word occurs 50 times in its 10 captions"):
        build_vocabulary([str(file)], 50)
    with pytest.raises(DataError, match="coco_2017_train: no captions there"):
        build_vocabulary(["coco_2017_train"])
    with pytest.raises(DataError, match="words.txt: is neither"):
        build_vocabulary(["words.txt"])


def test_the_command(file, tmp_path):
    output = tmp_path / "folder" / "vocabulary.json"
    words = ["--captions", str(file), "--output", str(output)]
    status, shown = processes.run("build_vocabulary.py", words, tmp_path / "log")
    assert status == 0 and shown.strip().splitlines()[-1] == str(output), shown
    assert Vocabulary.read(output) == build_vocabulary([str(file)], 5)
    assert [entry.name for entry in output.parent.iterdir()] == ["vocabulary.json"]
    status, shown = processes.run("build_vocabulary.py", [*words, "--min-count", "99"], tmp_path / "log")
    assert status == 1
    assert shown.strip().splitlines()[-1].startswith(f"error: {file}: no word occurs 99 times")
    assert Vocabulary.read(output) == build_vocabulary([str(file)], 5), "the old file stays"
