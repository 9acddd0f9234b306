"""Heads from configs: names, sizes and label spaces."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec

from visft import add_visft_config
from visft.errors import ConfigError
from visft.modeling.heads import DETRHead, LabelSpace, Mask2FormerHead, build_head, label_space

SHAPE = ShapeSpec(channels=20, stride=8)


@pytest.fixture
def cfg():
    """Small heads, and a data set of three classes whose metadata is filled by loading it."""
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.MODEL.VISFT.DETECTION.merge_from_list(["ENCODER_DIM", 32, "DECODER_DIM", 64, "NUM_QUERIES", 7])
    cfg.MODEL.VISFT.SEGMENTATION.merge_from_list(["DIM", 64, "NUM_QUERIES", 9, "DECODER_LAYERS", 2])
    cfg.DATASETS.TRAIN = ("heads_test_set",)
    cfg.TEST.DETECTIONS_PER_IMAGE = 13

    def load() -> list:
        meta = MetadataCatalog.get("heads_test_set")
        meta.thing_classes = ["ant", "bee", "cow"]
        meta.thing_dataset_id_to_contiguous_id = {3: 0, 17: 1, 20: 2}
        return []

    DatasetCatalog.register("heads_test_set", load)
    yield cfg
    DatasetCatalog.remove("heads_test_set")
    MetadataCatalog.pop("heads_test_set", None)


def test_sizes_come_from_the_config_and_classes_from_the_data_set(cfg):
    detection = build_head(cfg, "detection", SHAPE)
    assert isinstance(detection, DETRHead)
    assert detection.input_proj.weight.shape == (32, 20, 1, 1)
    assert detection.class_embeds.weight.shape == (3 + 1, 64)
    assert detection.query_embeds.weight.shape == (7, 64)
    assert len(detection.transformer.encoder.layers) == len(detection.transformer.decoder.layers) == 6
    segmentation = build_head(cfg, "segmentation", {"last_feat": SHAPE})
    assert isinstance(segmentation, Mask2FormerHead)
    assert segmentation.predictor.class_embed.weight.shape == (3 + 1, 64)
    assert segmentation.predictor.query_feat.weight.shape == (9, 64)
    assert len(segmentation.predictor.transformer_ffn_layers) == 2
    assert len(segmentation.pixel_decoder.transformer.encoder.layers) == 6
    assert detection.max_detections == segmentation.max_detections == 13


def test_numbers_reach_the_heads(cfg):
    """Each key is read: none that differs from its default leaves the head as it was."""
    for name, keys in (
        (
            "detection",
            {
                "DROPOUT": 0.4,
                "NO_OBJECT_WEIGHT": 0.3,
                "CLASS_WEIGHT": 3.0,
                "L1_WEIGHT": 7.0,
                "GIOU_WEIGHT": 9.0,
            },
        ),
        (
            "segmentation",
            {"NO_OBJECT_WEIGHT": 0.3, "CLASS_WEIGHT": 3.0, "MASK_WEIGHT": 7.0, "DICE_WEIGHT": 9.0},
        ),
    ):
        cfg.MODEL.VISFT[name.upper()].merge_from_list([x for pair in keys.items() for x in pair])
        head = build_head(cfg, name, SHAPE)
        for key, value in keys.items():
            found = (
                head.transformer.encoder.layers[0].dropout.p
                if key == "DROPOUT"
                else getattr(head, key.lower())
            )
            assert found == value, key
    cfg.MODEL.VISFT.SEGMENTATION.merge_from_list(
        ["NUM_POINTS", 100, "OVERSAMPLE_RATIO", 2.0, "IMPORTANCE_RATIO", 0.5]
    )
    head = build_head(cfg, "segmentation", SHAPE)
    assert (head.num_points, head.num_candidates, head.num_important) == (100, 200, 50)


def test_class_layers_exist(cfg):
    for name in ("detection", "segmentation"):
        head = build_head(cfg, name, SHAPE)
        for layer in head.class_layers:
            assert head.get_submodule(layer).weight.shape[0] == 4


def test_label_spaces(cfg):
    node = cfg.MODEL.VISFT.DETECTION
    assert label_space(cfg, "detection") == LabelSpace(3)
    node.LABEL_SPACE = "dataset_id"
    assert label_space(cfg, "detection") == LabelSpace(21, (3, 17, 20))
    node.NUM_CLASSES = 91
    assert label_space(cfg, "detection") == LabelSpace(91, (3, 17, 20))
    node.NUM_CLASSES = 20
    with pytest.raises(
        ConfigError, match="MODEL.VISFT.DETECTION.NUM_CLASSES is 20.*category id 20.*at least 21"
    ):
        label_space(cfg, "detection")
    node.LABEL_SPACE = "coco"
    with pytest.raises(ConfigError, match="LABEL_SPACE: `coco` is unknown.*contiguous, dataset_id"):
        label_space(cfg, "detection")


def test_a_number_of_classes_needs_no_data_set(cfg):
    cfg.MODEL.VISFT.DETECTION.NUM_CLASSES = 8
    cfg.DATASETS.TRAIN = ()
    assert label_space(cfg, "detection") == LabelSpace(8)
    cfg.MODEL.VISFT.DETECTION.NUM_CLASSES = -1
    with pytest.raises(ConfigError, match="NUM_CLASSES is -1"):
        label_space(cfg, "detection")


def test_what_nothing_says_is_asked_for(cfg):
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty.*MODEL.VISFT.DETECTION.NUM_CLASSES"):
        label_space(cfg, "detection")
    cfg.DATASETS.TRAIN = ("no_such_set",)
    with pytest.raises(ConfigError, match="no_such_set"):
        label_space(cfg, "detection")
    DatasetCatalog.register("heads_bare_set", list)
    try:
        cfg.DATASETS.TRAIN = ("heads_bare_set",)
        with pytest.raises(ConfigError, match="heads_bare_set has no thing_classes"):
            label_space(cfg, "detection")
    finally:
        DatasetCatalog.remove("heads_bare_set")


def test_unknown_heads_are_named_with_the_known(cfg):
    with pytest.raises(ConfigError, match="`detector` is unknown.*detection, .*segmentation"):
        build_head(cfg, "detector", SHAPE)
    cfg.MODEL.VISFT.DETECTION.HEAD = "DETRHeed"
    with pytest.raises(ConfigError, match="MODEL.VISFT.DETECTION.HEAD: `DETRHeed` is unknown.*DETRHead"):
        build_head(cfg, "detection", SHAPE)
    with pytest.raises(ConfigError, match="gives 2.*p2, p3"):
        build_head(cfg, "segmentation", {"p2": SHAPE, "p3": SHAPE})
