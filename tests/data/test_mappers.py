"""Mapped images: boxes, masks and classes lie where the objects are seen, whatever was cut, flipped and resized."""

import numpy as np
import pytest
import torch
from coco_shapes import COLOURS, CONTIGUOUS
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks
from PIL import Image

from visft.data import ViSFTMapper, build_test_mapper
from visft.data.loader import load_records
from visft.data.mapper import build_augmentations
from visft.data.masks import run_lengths_of
from visft.errors import ConfigError

CHANNEL = {CONTIGUOUS[category]: colour.index(255) for category, colour in COLOURS.items()}


def _seen(image: torch.Tensor, channel: int) -> torch.Tensor:
    """The object's pixels, found by their colour."""
    return image[channel] > 127


@pytest.mark.parametrize("recipe", ["detection", "lsj", "fixed", "square"])
@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_annotations_lie_where_the_objects_are_seen(cfg, recipe: str, flip: str) -> None:
    cfg.VISFT.INPUT.AUGMENTATION = recipe
    cfg.VISFT.INPUT.JITTER_SCALE = (0.5, 2.0)
    cfg.VISFT.INPUT.CROP_PROBABILITY = 1.0
    cfg.INPUT.RANDOM_FLIP = flip
    mapper = ViSFTMapper(cfg, is_train=True)
    records = load_records(("visft_own_train",), train=True)
    np.random.seed(0)
    compared = 0
    for record in records * 3:
        mapped = mapper(record)
        image, instances = mapped["image"], mapped["instances"]
        if recipe == "square":
            assert image.shape[1:] == (cfg.VISFT.INPUT.SIZE, cfg.VISFT.INPUT.SIZE)
        assert image.dtype == torch.uint8 and instances.image_size == tuple(image.shape[1:])
        assert isinstance(instances.gt_masks, BitMasks)
        assert (mapped["height"], mapped["width"]) == (record["height"], record["width"])
        for box, label, mask in zip(
            instances.gt_boxes.tensor, instances.gt_classes.tolist(), instances.gt_masks.tensor, strict=True
        ):
            seen = _seen(image, CHANNEL[label])
            if min(seen.sum(), mask.sum()) < 200:
                continue  # in small ones the resampling of edge pixels decides
            assert (seen & mask).sum() / (seen | mask).sum() > 0.9
            ys, xs = torch.nonzero(seen, as_tuple=True)
            tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (box - tight).abs().max() <= 2, (box, tight)
            compared += 1
        # Nothing that can be seen well is without an annotation.
        for label, channel in CHANNEL.items():
            if _seen(image, channel).sum() >= 200:
                assert label in instances.gt_classes
    assert compared > 20


def test_boxes_are_those_of_the_masks_after_a_crop(cfg) -> None:
    cfg.VISFT.INPUT.CROP_PROBABILITY = 1.0
    mapper = ViSFTMapper(cfg, is_train=True)
    np.random.seed(1)
    for record in load_records(("visft_own_train",), train=True) * 3:
        instances = mapper(record)["instances"]
        assert torch.equal(instances.gt_masks.get_bounding_boxes().tensor, instances.gt_boxes.tensor)


@pytest.mark.parametrize("crop", [False, True])
def test_objects_are_those_of_detectron2s_own_mapping(cfg, crop: bool) -> None:
    """Masks drawn in a part of the image are those that detectron2 draws in the whole of it, of every shape and where
    a crop cuts them; without masks the boxes are the same."""
    from detectron2.data import detection_utils as d2

    rng = np.random.default_rng(0)
    for record in load_records(("visft_own_train",), train=True):
        height, width = record["height"], record["width"]
        for annotation in record["annotations"]:
            # Two stars of any form each, some of which reach out of the image.
            stars = rng.uniform((-20, -20), (width + 20, height + 20), (2, 1, 2)) + rng.normal(
                0, 25, (2, 9, 2)
            )
            annotation["segmentation"] = [star.round(2).ravel().tolist() for star in stars]
        left, top = (width // 4, height // 4) if crop else (0, 0)
        transforms = T.TransformList(
            [
                T.HFlipTransform(width),
                T.CropTransform(left, top, width - left, height - top, width, height)
                if crop
                else T.NoOpTransform(),
                T.ResizeTransform(height - top, width - left, 131, 173),
            ]
        )
        mapper = ViSFTMapper(augmentations=list(transforms.transforms), is_train=True)
        bare = ViSFTMapper(augmentations=list(transforms.transforms), is_train=True, reads_masks=False)
        found, boxes = mapper(record)["instances"], bare(record)["instances"]
        moved = [
            [transforms.apply_coords(np.reshape(p, (-1, 2))).ravel() for p in a["segmentation"]]
            for a in record["annotations"]
        ]
        expected = d2.annotations_to_instances(
            [
                d2.transform_instance_annotations(
                    # As floats: detectron2 cuts boxes of whole numbers to whole numbers when it resizes.
                    {"bbox": [float(side) for side in annotation["bbox"]]}
                    | {key: annotation[key] for key in ("bbox_mode", "category_id")},
                    transforms,
                    (131, 173),
                )
                | {"segmentation": polygons}
                for annotation, polygons in zip(record["annotations"], moved, strict=True)
            ],
            (131, 173),
            "bitmask",
        )
        if crop:
            expected.gt_boxes = expected.gt_masks.get_bounding_boxes()
        expected = d2.filter_empty_instances(expected)
        # Where an edge runs exactly between two pixels, a shift may round it to the other.
        assert (found.gt_masks.tensor != expected.gt_masks.tensor).sum() <= 2
        assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
        assert torch.equal(found.gt_classes, expected.gt_classes)
        assert torch.equal(boxes.gt_boxes.tensor, found.gt_boxes.tensor) and not boxes.has("gt_masks")


def test_polygons_and_run_lengths_give_the_same_mask(cfg, coco) -> None:
    """The same shapes, once as the polygons of the file and once drawn by hand as run lengths."""
    from pycocotools import mask as mask_api

    record = next(r for r in load_records(("visft_own_train",), train=True) if r["image_id"] == 1)
    image = np.asarray(Image.open(record["file_name"]))
    drawn = []
    for annotation in record["annotations"]:
        channel = CHANNEL[annotation["category_id"]]
        rle = mask_api.encode(np.asfortranarray((image[..., channel] > 127).astype(np.uint8)))
        drawn.append(annotation | {"segmentation": rle})
    mapper = ViSFTMapper(augmentations=[T.HFlipTransform(record["width"])], is_train=True)
    a, b = (
        mapper(record | {"annotations": x})["instances"].gt_masks.tensor
        for x in (record["annotations"], drawn)
    )
    assert ((a & b).sum((1, 2)) / (a | b).sum((1, 2))).min() > 0.9
    for annotation in drawn:  # as people write them: a text, a list of counts
        counts = annotation["segmentation"]["counts"]
        kinds = {"text": counts.decode(), "list": run_lengths_of(counts.decode())}
        for kind, value in kinds.items():
            annotation[kind] = annotation["segmentation"] | {"counts": value}
    for kind in ("text", "list"):
        written = [a | {"segmentation": a[kind]} for a in drawn]
        assert torch.equal(mapper(record | {"annotations": written})["instances"].gt_masks.tensor, b)


def test_sizes_of_the_recipes(cfg) -> None:
    records = load_records(("visft_own_train",), train=True)
    cfg.VISFT.INPUT.CROP_PROBABILITY = 0.0
    mapper = ViSFTMapper(cfg, is_train=True)
    short = {min(mapper(r)["image"].shape[1:]) for r in records * 4}
    assert len(short) > 1 and short <= set(range(80, 129))
    assert all(max(mapper(r)["image"].shape[1:]) <= 160 for r in records)
    cfg.VISFT.INPUT.AUGMENTATION = "fixed"
    mapper = ViSFTMapper(cfg, is_train=True)
    assert all(max(mapper(r)["image"].shape[1:]) == 160 for r in records)
    cfg.VISFT.INPUT.AUGMENTATION = "lsj"
    mapper = ViSFTMapper(cfg, is_train=True)
    sides = [max(mapper(r)["image"].shape[1:]) for r in records * 8]
    assert max(sides) == 160 and min(sides) < 80


def test_crowds_and_what_is_cut_off_are_left_out(cfg, coco) -> None:
    content = coco.content()
    content["annotations"][0]["iscrowd"] = 1
    coco.write(content)
    record = load_records(("visft_own_train",), train=True)[0]
    left = T.CropTransform(0, 0, record["width"] // 3, record["height"], record["width"], record["height"])
    whole = ViSFTMapper(augmentations=[T.NoOpTransform()], is_train=True)(record)["instances"]
    assert sorted(whole.gt_classes.tolist()) == sorted(CONTIGUOUS[c] for c in (3, 11))
    # Only the crowd is in the left third: annotated, with nothing to find.
    cut = ViSFTMapper(augmentations=[left], is_train=True)(record)["instances"]
    assert len(cut) == 0 and cut.gt_masks.tensor.shape == (0, record["height"], record["width"] // 3)


def test_an_image_without_objects_has_empty_instances(cfg, coco) -> None:
    content = coco.content()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    coco.write(content)
    mapper = ViSFTMapper(cfg, is_train=True)
    empty = mapper(load_records(("visft_own_train",), train=True)[1])["instances"]
    assert len(empty) == 0 and empty.has("gt_boxes") and empty.has("gt_masks")


def test_a_data_set_without_masks_has_none(cfg, coco) -> None:
    content = coco.content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    coco.write(content)
    cfg.VISFT.INPUT.CROP_PROBABILITY = 1.0
    instances = ViSFTMapper(cfg, is_train=True)(load_records(("visft_own_train",), train=True)[0])[
        "instances"
    ]
    assert instances.has("gt_boxes") and not instances.has("gt_masks")


def test_a_data_set_without_annotations_has_no_instances(coco) -> None:
    record = {"file_name": str(coco.images / "1.png"), "captions": ["three shapes"]}
    mapped = ViSFTMapper(augmentations=[T.NoOpTransform()], is_train=True)(record)
    assert "instances" not in mapped and mapped["captions"] == ["three shapes"]


def test_records_are_not_changed(cfg) -> None:
    import copy

    record = load_records(("visft_own_train",), train=True)[0]
    before = copy.deepcopy(record)
    ViSFTMapper(cfg, is_train=True)(record)
    assert record == before


def test_evaluation_resizes_and_nothing_else(cfg) -> None:
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 0, 0
    record = DatasetCatalog.get("visft_own_test")[0]
    mapped = build_test_mapper(cfg)(record)
    expected = torch.from_numpy(np.array(Image.open(record["file_name"]))).permute(2, 0, 1)
    assert torch.equal(mapped["image"], expected) and "instances" not in mapped
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 100, 1000
    assert min(build_test_mapper(cfg)(record)["image"].shape[1:]) == 100


def test_unknown_recipes(cfg) -> None:
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ConfigError, match="INPUT.RANDOM_FLIP is `diagonal`"):
        ViSFTMapper(cfg, is_train=True)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.VISFT.INPUT.AUGMENTATION = "mosaic"
    with pytest.raises(ConfigError, match="VISFT.INPUT.AUGMENTATION is `mosaic`"):
        ViSFTMapper(cfg, is_train=True)


@pytest.mark.parametrize("recipe", ["fixed", "detection", "lsj"])
def test_a_thin_image_keeps_a_pixel(cfg, recipe):
    cfg.VISFT.INPUT.AUGMENTATION, cfg.VISFT.INPUT.SIZE, cfg.VISFT.INPUT.CROP_PROBABILITY = recipe, 128, 0.0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (128,), 128
    for shape in ((4, 3000, 3), (3000, 4, 3)):
        seen = T.AugInput(np.zeros(shape, np.uint8))
        T.AugmentationList(build_augmentations(cfg))(seen)
        assert min(seen.image.shape[:2]) == 1 and max(seen.image.shape[:2]) > 1
