"""Stock detectors get the data that detectron2's own mapper gives them, and it also works on files that stop that."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.structures import BitMasks
from PIL import Image

from visft.data import ImageError, register_own_data
from visft.data.stock_data import (
    StockMapper,
    build_stock_test_loader,
    build_stock_train_loader,
    stock_records,
)
from visft.errors import DataError

TRAIN = ("visft_own_train",)


@pytest.fixture
def stock(cfg):
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (100, 140), 120
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg


def same(ours: dict, theirs: dict) -> None:
    assert torch.equal(ours["image"], theirs["image"])
    for key in ("file_name", "image_id", "height", "width"):
        assert ours[key] == theirs[key]
    assert ("instances" in ours) == ("instances" in theirs)
    if "instances" in ours:
        a, b = ours["instances"], theirs["instances"]
        assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor) and torch.equal(a.gt_classes, b.gt_classes)
        tight = [m.gt_masks.get_bounding_boxes().tensor for m in (a, b)]
        assert torch.equal(*tight)


@pytest.mark.parametrize("colours", ["BGR", "RGB"])
def test_ordinary_images_are_mapped_as_detectron2_maps_them(stock, colours):
    stock.INPUT.FORMAT = colours
    polygons = stock_records(stock, TRAIN, train=True)[::2]  # detectron2's mapper stops at the others
    assert len(polygons) == 4
    mappers = [make(stock, True) for make in (StockMapper, DatasetMapper)]
    for seed, record in enumerate(polygons):
        found = []
        for mapper in mappers:
            np.random.seed(seed)
            found.append(mapper(record))
        same(*found)


def test_test_images_are_those_of_detectron2s_loader(stock):
    ours = build_stock_test_loader(stock, "visft_own_test")
    theirs = build_detection_test_loader(stock, "visft_own_test", mapper=DatasetMapper(stock, False))
    assert len(ours) == len(theirs) == 7
    for (a,), (b,) in zip(ours, theirs, strict=True):
        same(a, b)


def test_run_lengths_are_masks_too(stock):
    """Of the same shapes; detectron2's mapper asks for another INPUT.MASK_FORMAT."""
    records = stock_records(stock, TRAIN, train=True)
    stock.INPUT.RANDOM_FLIP = "none"
    mapper = StockMapper(stock, True)
    for record in (records[1], records[0], records[1]):
        masks = mapper(record)["instances"].gt_masks
        assert isinstance(masks, BitMasks) == (record["image_id"] == 2)
    with pytest.raises(ValueError, match="polygon"):
        DatasetMapper(stock, True)(records[1])


def test_annotations_of_stored_pixels(stock, coco):
    """The camera held upright, the annotations made on the pixels as they lie in the file."""
    record = stock_records(stock, TRAIN, train=True)[0]
    mapper = StockMapper(stock, False)
    plain = mapper(record)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(record["file_name"]).save(record["file_name"], exif=exif)
    assert torch.equal(mapper(record)["image"], plain["image"])


def test_broken_images_are_left_out_where_the_config_says_so(stock, coco):
    records = stock_records(stock, TRAIN, train=True)
    whole = (coco.images / "3.png").read_bytes()
    (coco.images / "3.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    stock.DATALOADER.SKIP_BROKEN = True
    found = [batch[0]["image_id"] for batch in build_stock_test_loader(stock, "visft_own_test")]
    assert found == [1, 2, 4, 5, 6, 7]
    loader, seen = iter(build_stock_train_loader(stock)), set()
    for _ in range(12):
        seen |= {sample["image_id"] for sample in next(loader)}
    assert seen == {1, 2, 4, 5, 6, 7}
    stock.DATALOADER.SKIP_BROKEN = False
    with pytest.raises(ImageError, match=r"3\.png: the image is cut off or broken"):
        StockMapper(stock, True)(records[2])


def test_large_images_are_named_with_the_key(stock):
    stock.VISFT.DATA.MAX_PIXELS = 1000
    with pytest.raises(DataError, match=r"VISFT\.DATA\.MAX_PIXELS"):
        build_stock_train_loader(stock)


def test_images_without_objects_follow_the_config(stock, coco):
    content = coco.content()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 5]
    coco.write(content)
    register_own_data(stock)
    assert [r["image_id"] for r in stock_records(stock, TRAIN, train=True)] == [1, 2, 3, 4, 6, 7]
    stock.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(stock_records(stock, TRAIN, train=True)) == 7
