"""Big files: one process parses, all map what it wrote, and nothing else is different."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json as load_stock
from detectron2.data.datasets import register_coco_instances

from visft.data import build_train_loader, check_data_set, register_own_data
from visft.data.datasets import catalog, json_arrays
from visft.data.datasets import packed as packed_files
from visft.data.datasets.captions import check_captions
from visft.data.datasets.coco import PackedRecords, outlines_of
from visft.data.labelled_images import load_labelled
from visft.data.loader import load_records
from visft.data.repeat_factor import repeat_factors
from visft.errors import DataError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, into which all files are big enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_files, "SMALL", 0)
    return tmp_path / "cache" / "visft"


@pytest.fixture
def captioned(cfg, coco, tmp_path):
    """Own data with captions, a crowd, keypoints, an image with a crowd alone and one with nothing."""
    content = coco.content()
    crowds = [a for a in content["annotations"] if a["image_id"] == 6]
    for annotation in crowds:
        height, width = (content["images"][5][side] for side in ("height", "width"))
        annotation |= {
            "iscrowd": 1,
            "segmentation": {"size": [height, width], "counts": [9, height * width - 9]},
        }
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 7]
    content["annotations"][0]["keypoints"] = [3, 4, 2, 5, 6, 1]
    coco.write(content)
    captions = [{"id": n, "image_id": i, "caption": f"a text {n} é"} for n, i in enumerate((1, 6, 1, 3))]
    cfg.VISFT.DATA.TRAIN_CAPTIONS = str(tmp_path / "captions.json")
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    register_own_data(cfg)
    return cfg


def everything(cfg) -> list:
    """What a run asks of its training data."""
    check_data_set(cfg, "visft_own_train")
    meta = MetadataCatalog.get("visft_own_train")
    found = [meta.thing_classes, meta.thing_dataset_id_to_contiguous_id, check_captions("visft_own_train")]
    found.append(list(DatasetCatalog.get("visft_own_train")))
    for empty in (True, False):
        records = load_records(("visft_own_train",) * 2, train=True, filter_empty=empty)
        found += [list(records), repeat_factors(records, 0.5).tolist(), len(records)]
    labelled = load_labelled(cfg, {"detection": lambda image: len(image.get("instances", ())) > 0})
    found += [
        labelled.rows["detection"].tolist(),
        [labelled.records[i] for i in range(len(labelled.records))],
    ]
    return found


def test_nothing_is_different(captioned, coco, cache, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(packed_files, "SMALL", 2**30)
        plain = everything(captioned)
    assert not cache.exists()
    clear()
    found = everything(captioned)
    assert isinstance(DatasetCatalog.get("visft_own_train"), PackedRecords)
    assert json.loads(json.dumps(found, default=as_text)) == json.loads(json.dumps(plain, default=as_text))
    stock = load_stock(str(coco.json_file), str(coco.images), "visft_own_train")
    assert json.dumps(list(DatasetCatalog.get("visft_own_train")), default=as_text) == json.dumps(
        stock, default=as_text
    )
    outlines = list(outlines_of(load_records(("visft_own_train",), train=True)))
    assert not any("bbox" in a for outline in outlines for a in outline["annotations"]) and len(outlines) == 7


def as_text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def clear() -> None:
    catalog._read.cache_clear()
    from visft.data.datasets import captions

    captions._read.cache_clear()


def test_a_file_is_parsed_once_and_again_when_it_changed(captioned, coco, cache, monkeypatch):
    everything(captioned)
    clear()
    with monkeypatch.context() as patched:
        for name in (
            "captions.read_json",
            "catalog.read_json",
            "coco.read_json",
            "coco.JSONArrays",
        ):
            patched.setattr(f"visft.data.datasets.{name}", None)
        everything(captioned)
    assert len(list(cache.glob("*.rows"))) == 2 and not list(cache.glob(".*.tmp"))
    content = coco.content()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    coco.write(content)
    with pytest.raises(DataError, match="annotation 100"):
        everything(captioned)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:30] + b"!" + b[31:]])
def test_a_damaged_cache_is_made_again(captioned, cache, damage):
    plain = json.dumps(everything(captioned), default=as_text)
    for file in cache.glob("*.rows"):
        file.write_bytes(damage(file.read_bytes()))
    clear()
    assert json.dumps(everything(captioned), default=as_text) == plain


def test_without_a_place_for_it_every_process_parses(captioned, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert isinstance(DatasetCatalog.get("visft_own_train"), list)
    assert "every process parses" in caplog.text


def test_ids_beyond_64_bits_are_kept_as_they_are(captioned, coco, cache):
    content = coco.content()
    content["images"][6]["id"] = 10**30
    coco.write(content)
    assert [r["image_id"] for r in load_records(("visft_own_train",), train=True)][6] == 10**30


def test_names_registered_with_detectron2_are_read_here_too(coco, cache):
    register_coco_instances("packed_test", {}, str(coco.json_file), str(coco.images))
    try:
        records = load_records(("packed_test",), train=True)
        assert isinstance(records, PackedRecords)
        assert json.dumps(DatasetCatalog.get("packed_test"), default=as_text) == json.dumps(
            [{k: v for k, v in r.items() if k not in ("has_masks", "captions")} for r in records],
            default=as_text,
        )
    finally:
        DatasetCatalog.remove("packed_test")
        MetadataCatalog.remove("packed_test")


@pytest.mark.parametrize(
    "order", [("images", "annotations", "categories"), ("info", "annotations", "images")]
)
@pytest.mark.parametrize("indent", [None, 1])
def test_pieces_are_the_whole(captioned, coco, cache, monkeypatch, order, indent):
    """Pieces of any size, with texts that look like the end of one, and whatever order the lists are in."""
    content = coco.content()
    content["info"] = {"annotations": 3, "list": [{"a": [{"b": 1}, {"c": 2}]}, {"images": []}]}
    content["images"][1]["note"] = '"}, {" ]} "categories": [{"id": 1}] \\"'
    content["annotations"][4] |= {"attributes": [{"a": 1}, {"b": [{}]}], "note": "}]"}
    keys = [*order, *(key for key in content if key not in order)]
    coco.json_file.write_text(json.dumps({key: content[key] for key in keys}, indent=indent))
    with monkeypatch.context() as patched:
        patched.setattr(packed_files, "SMALL", 2**30)
        check_data_set(captioned, "visft_own_train")
        plain = json.dumps(DatasetCatalog.get("visft_own_train"), default=as_text)
    for size in (1, 50, 700, 10**6):
        monkeypatch.setattr(json_arrays, "PIECE", size)
        for file in cache.glob("*.rows"):
            file.unlink()
        clear()
        check_data_set(captioned, "visft_own_train")
        assert json.dumps(list(DatasetCatalog.get("visft_own_train")), default=as_text) == plain
        assert json_arrays_of(coco.json_file, "annotations") in (content["annotations"], None)
    content.pop("info")
    coco.write(content)
    assert json_arrays_of(coco.json_file, "annotations") == content["annotations"]


def json_arrays_of(file, key):
    """The list by pieces; None where the file cannot be split."""
    arrays = json_arrays.JSONArrays(str(file))
    try:
        found = list(arrays.entries(key))
        arrays.rest()
    except json_arrays.NotSplitError:
        return None
    return found


def _row(records, queue):
    queue.put((os.getpid(), records[2]["file_name"], records[2]["captions"]))


def test_other_processes_map_the_file(captioned, cache):
    """Also those that are not forked: what is sent to them is a path."""
    records = load_records(("visft_own_train",), train=True)
    assert len(pickle.dumps(records)) < 4000 < sum(f.stat().st_size for f in cache.glob("coco-*.rows"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_row, args=(records, queue))
    process.start()
    pid, name, captions = queue.get(timeout=120)
    process.join()
    assert pid != os.getpid() and (name, captions) == (records[2]["file_name"], ["a text 3 é"])


def test_the_stream_of_batches_is_the_same(captioned, cache, monkeypatch):
    def images() -> list:
        loader = build_train_loader(captioned, batch_size=2, seed=3)
        return [sample["image"].numpy() for _ in range(4) for sample in next(loader)]

    found = images()
    monkeypatch.setattr(packed_files, "SMALL", 2**30)
    assert all(np.array_equal(a, b) for a, b in zip(found, images(), strict=True))
