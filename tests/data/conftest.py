"""The small data set of `coco_shapes.py` on disk, and a config that uses it."""

from pathlib import Path

import pytest
from coco_shapes import Coco, make_coco


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    return make_coco(tmp_path)


@pytest.fixture
def cfg(coco: Coco):
    """A config that trains on the small data set and evaluates on it."""
    from detectron2.config import get_cfg

    from visft import add_visft_config
    from visft.data import register_own_data

    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.VISFT.DATA.TRAIN_JSON = cfg.VISFT.DATA.TEST_JSON = str(coco.json_file)
    cfg.VISFT.DATA.TRAIN_IMAGES = cfg.VISFT.DATA.TEST_IMAGES = str(coco.images)
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 112, 128)
    cfg.INPUT.MAX_SIZE_TRAIN = 160
    cfg.VISFT.INPUT.SIZE = 160
    cfg.VISFT.INPUT.CROP_RESIZE = (100, 120)
    cfg.VISFT.INPUT.CROP_SIZE = (64, 100)
    cfg.DATALOADER.NUM_WORKERS = 0
    register_own_data(cfg)
    return cfg
