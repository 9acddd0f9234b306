"""Captioned images in tar files, compared with the webdataset library, which writes and reads them."""

import functools
import gzip
import io
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
import webdataset_shards
from detectron2.config import get_cfg
from PIL import Image

from visft import add_visft_config
from visft.data import build_train_loader, check_data_set, load_labelled, register_own_data
from visft.data.caption_vocabulary import build_vocabulary
from visft.data.datasets import shards as shard_files
from visft.data.datasets.captions import captions_of, check_captions
from visft.data.datasets.catalog import OWN_SHARDS, OWN_TRAIN
from visft.data.datasets.shards import ShardRecords, load_shards, shard_paths
from visft.data.images import ImageError, read_annotated
from visft.data.loader import TrainLoader, load_records
from visft.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "visft"


@pytest.fixture
def folder(tmp_path):
    return webdataset_shards.make(tmp_path / "shards")


def config(pattern):
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.VISFT.DATA.TRAIN_SHARDS = str(pattern)
    cfg.DATALOADER.NUM_WORKERS = 0
    register_own_data(cfg)
    return cfg


def theirs(paths) -> list[tuple[str, np.ndarray, str]]:
    """Key, pixels and caption of each sample, as webdataset's reader gives them."""
    found = []
    for sample in webdataset.WebDataset([str(p) for p in paths], shardshuffle=False).decode("rgb8"):
        caption = sample["txt"] if "txt" in sample else sample["json"]["caption"]
        found.append((sample["__key__"], sample["jpg"], caption))
    return found


@pytest.mark.parametrize("pattern", ["{}", "{}/*.tar", "{}/{{00000..00001}}.tar"])
def test_images_and_captions_are_those_of_webdataset(folder, pattern):
    expected = theirs(sorted(folder.glob("*.tar")))
    cfg = config(pattern.format(folder))
    assert cfg.DATASETS.TRAIN == (OWN_SHARDS,) and cfg.DATASETS.TEST == ()
    check_data_set(cfg, OWN_SHARDS)
    records = load_records((OWN_SHARDS,), train=True, filter_empty=True)
    assert len(records) == len(expected) == 6
    for record, (key, pixels, caption) in zip(records, expected, strict=True):
        assert record["captions"] == [caption] and record["file_name"].endswith(f".tar/{key}.jpg")
        np.testing.assert_array_equal(read_annotated(record), pixels)
    assert list(captions_of(OWN_SHARDS).values()) == [[caption] for _, _, caption in expected]
    assert check_captions(OWN_SHARDS) == 6 and "shapes" in build_vocabulary([OWN_SHARDS], 6).words


def test_any_tar_format_and_names(tmp_path):
    """Long names (pax and GNU headers), folders, and members in an order that webdataset's reader does not take."""
    key = "a/" * 60 + "b" * 90
    content = {f"{key}.PNG": _encoded("PNG"), "__meta__.json": b"{}", "c.jpg": _encoded("JPEG")}
    content |= {f"{key}.txt": b"one", "c.seg.png": b"", "c.txt": b"\xef\xbb\xbftwo \n", "readme": b""}
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=tar_format) as tar:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        records = load_shards(str(tmp_path))
        assert [record["captions"] for record in records] == [["one"], ["two"]]
        assert [read_annotated(record).shape for record in records] == [(5, 4, 3)] * 2
        assert records._file.summary["faults"] == 0


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 5), (255, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def _without(extension: str, samples: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in s.items() if k not in ("txt", "json", extension)} for s in samples[:1]
    ] + samples[1:]


def _changed(samples: list[dict], **members: bytes) -> list[dict]:
    return [{"__key__": "0", "jpg": samples[0]["jpg"], **members}, *samples[1:]]


# What happens to the three samples of the second shard; how many of the data set's six are left; words of the error.
FAULTS = {
    "cut in an image": (
        lambda s: _tar(s, closed=False)[:-600],
        5,
        "00001.tar: the shard is cut off or broken at byte",
    ),
    "cut between members": (lambda s: _tar(s, closed=False), 6, "00001.tar: the shard is cut off"),
    "cut in a header": (lambda s: _tar(s, closed=False) + b"x" * 100, 6, "the shard is cut off"),
    "empty": (lambda s: b"", 3, "00001.tar: the shard is cut off or broken at byte 0"),
    "no tar": (lambda s: b"<html>404" * 999, 3, "00001.tar: the shard is cut off or broken at byte 0"),
    "no text": (lambda s: _tar(_without("txt", s)), 5, "00001.tar: 000000003 has no caption: expected"),
    "no image": (lambda s: _tar([{"__key__": "0", "txt": b"a"}, *s[1:]]), 5, "00001.tar: 0 has no image"),
    "no image file": (
        lambda s: _tar(_changed(s, txt=b"a", jpg=b"no")),
        5,
        "00001.tar/0.jpg: the file is not an im",
    ),
    "empty text": (lambda s: _tar(_changed(s, txt=b" \n")), 5, "0 has no caption"),
    "text in Latin-1": (lambda s: _tar(_changed(s, txt=b"caf\xe9")), 5, "0 has no caption"),
    "caption null": (lambda s: _tar(_changed(s, json=b'{"caption": null}')), 5, "0 has no caption"),
    "JSON broken": (lambda s: _tar(_changed(s, json=b'{"caption": "a"')), 5, "0 has no caption"),
    "two images": (lambda s: _tar(_changed(s, txt=b"a", png=s[1]["jpg"])), 6, "0 has two images"),
}


def _tar(samples: list[dict], closed: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for sample in samples:
            for kind in sorted(set(sample) - {"__key__"}, reverse=True):
                member = tarfile.TarInfo(f"{sample['__key__']}.{kind}")
                member.size = len(sample[kind])
                tar.addfile(member, io.BytesIO(sample[kind]))
        end = tar.offset
    return buffer.getvalue() if closed else buffer.getvalue()[:end]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_or_left_out(folder, tmp_path, fault):
    change, left, words = FAULTS[fault]
    samples = webdataset_shards.samples(tmp_path / "again")[3:]
    (folder / "00001.tar").write_bytes(change(samples))
    cfg = config(folder)
    with pytest.raises(DataError, match=f"1 fault in 2 shards, the first: .*{words}.*SKIP_BROKEN"):
        check_data_set(cfg, OWN_SHARDS)
    cfg.DATALOADER.SKIP_BROKEN = True
    check_data_set(cfg, OWN_SHARDS)
    records = build_train_loader(cfg, batch_size=1, seed=0)._loader.dataset.samples[0].records
    assert len(records) == left
    assert all(read_annotated(record).size for record in records)


@pytest.mark.parametrize(
    "pattern, change, words",
    [
        ("{}/{{00000..00002}}.tar", None, r"00002.tar: the shard is not there \(1 of the 3"),
        ("{}/*.tgz", None, "no file is there; expected a folder with"),
        ("{}", gzip.compress, r"00001.tar: the shard is compressed \(gzip\).*unpack"),
    ],
)
def test_shards_that_cannot_be_used(folder, pattern, change, words):
    if change:
        (folder / "00001.tar").write_bytes(change((folder / "00001.tar").read_bytes()))
    for skip in (False, True):
        cfg = config(pattern.format(folder))
        cfg.DATALOADER.SKIP_BROKEN = skip
        with pytest.raises(DataError, match=words):
            check_data_set(cfg, OWN_SHARDS)


def test_images_above_the_limit_and_nothing_left(folder, tmp_path):
    cfg = config(folder)
    cfg.VISFT.DATA.MAX_PIXELS = 100
    with pytest.raises(
        DataError, match=r"the image has [\d,]+ pixels, more than the 100 of VISFT.DATA.MAX_PIXELS"
    ):
        check_data_set(cfg, OWN_SHARDS)
    webdataset_shards.write(tmp_path / "none" / "0.tar", [{"__key__": "0", "txt": b"a"}])
    cfg = config(tmp_path / "none")
    cfg.DATALOADER.SKIP_BROKEN = True
    with pytest.raises(DataError, match="none of its 1 shards has an image with a caption.*0 has no image"):
        check_data_set(cfg, OWN_SHARDS)


def test_pixels_that_do_not_decode_are_an_error_of_the_image(folder, tmp_path):
    """Its header passes. It is replaced by another image if SKIP_BROKEN allows it."""
    samples = webdataset_shards.samples(tmp_path / "again")[3:]
    samples[0]["jpg"] = samples[0]["jpg"][:-20]
    webdataset_shards.write(folder / "00001.tar", samples)
    cfg = config(folder)
    check_data_set(cfg, OWN_SHARDS)
    with pytest.raises(ImageError, match="00001.tar/000000003.jpg: the image is cut off"):
        next(build_train_loader(cfg, batch_size=6, seed=0))
    cfg.DATALOADER.SKIP_BROKEN = True
    loader = build_train_loader(cfg, batch_size=6, seed=0)
    assert len(next(loader)) == 6 and list(loader.skipped) == [f"{folder}/00001.tar/000000003.jpg"]


def test_the_index_is_made_once_and_again_when_a_shard_changed(folder, cache, tmp_path, monkeypatch):
    first = list(load_shards(str(folder)))
    assert len(list(folder.glob(".visft-shards-*.rows"))) == 1 and not cache.exists()
    with monkeypatch.context() as patched:
        patched.setattr(shard_files, "_Shard", None)  # nothing is read again
        assert list(load_shards(str(folder))) == first
        moved = folder.rename(tmp_path / "elsewhere")
        assert [r["captions"] for r in load_shards(str(moved))] == [r["captions"] for r in first]
    webdataset_shards.write(moved / "00001.tar", webdataset_shards.samples(tmp_path / "again")[:1])
    assert [r["captions"] for r in load_shards(str(moved))] == [r["captions"] for r in [*first[:3], first[0]]]
    assert not list(moved.glob("*.tmp"))


def test_the_index_is_in_the_cache_if_the_folder_is_not_writable(folder, cache, monkeypatch):
    load_shards(str(folder))
    (index,) = folder.glob(".visft-shards-*.rows")
    index.unlink()
    index.mkdir()  # also root cannot replace it
    expected = len(load_shards(str(folder)))
    assert expected == 6 and len(list(cache.glob("shards-*.rows"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "00000.tar"))
    with pytest.raises(DataError, match="index of .* cannot be written.*XDG_CACHE_HOME"):
        load_shards(str(folder))


def test_processes_share_one_index(folder):
    """Four processes start together, without an index; records that go to a process are small."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_load, [str(folder)] * 4)
    records = load_shards(str(folder))
    assert results == [list(records)] * 4
    packed = pickle.dumps(records)
    assert len(packed) < 2000 and list(pickle.loads(packed)) == list(records)


def _load(folder: str) -> list[dict]:
    return list(load_shards(folder))


def test_ranks_and_resumed_runs_have_the_same_stream(folder):
    """Two ranks, with worker processes, and a start in the middle against one process from the start."""
    records = load_shards(str(folder))
    loader = functools.partial(TrainLoader, records, _decoded, batch_size=4, seed=3)
    whole = loader(rank=0, world_size=1)
    expected = [next(whole) for _ in range(5)]
    assert len({image["image_id"] for batch in expected[:3] for image in batch}) == 6
    ranks = [loader(rank=r, world_size=2, start_iteration=2, num_workers=2) for r in range(2)]
    for batch in expected[2:]:
        found = [image for rank in ranks for image in next(rank)]
        assert [image["image_id"] for image in found] == [image["image_id"] for image in batch]
        for image, other in zip(found, batch, strict=True):
            np.testing.assert_array_equal(image["image"], other["image"])


def _decoded(record: dict) -> dict:
    return {"image": read_annotated(record), "image_id": record["image_id"]}


def test_beside_other_training_data(folder, cfg):
    """Heads find their labels, and the classes are those of the annotation file."""
    cfg.VISFT.DATA.TRAIN_SHARDS = str(folder)
    for _ in range(2):
        register_own_data(cfg)
        assert cfg.DATASETS.TRAIN == (OWN_TRAIN, OWN_SHARDS)
    for name in cfg.DATASETS.TRAIN:
        check_data_set(cfg, name)
    heads = {"detection": lambda image: "instances" in image, "captioning": lambda image: "captions" in image}
    labelled = load_labelled(cfg, heads)
    count = len(labelled.records) - 6
    assert labelled.rows["detection"].tolist() == list(range(count))
    assert labelled.rows["captioning"].tolist() == list(range(count, count + 6))
    assert isinstance(labelled.of("captioning")[0]["captions"][0], str)


def test_named_beside_registered_data(folder):
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train", OWN_SHARDS), ("coco_2017_val",)
    cfg.VISFT.DATA.TRAIN_SHARDS = os.fspath(folder)
    register_own_data(cfg)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train", OWN_SHARDS) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert isinstance(load_records((OWN_SHARDS,), train=True), ShardRecords)


@pytest.mark.parametrize(
    "pattern, count, last",
    [("s/{000..099}/{0..1}.tar", 200, "s/099/1.tar"), ("s/{8..11}.tar", 4, "s/11.tar")],
)
def test_ranges(pattern, count, last, monkeypatch):
    braceexpand = pytest.importorskip("braceexpand")  # webdataset's
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    found = shard_paths(pattern)
    assert found == list(braceexpand.braceexpand(pattern)) and len(found) == count and found[-1] == last
