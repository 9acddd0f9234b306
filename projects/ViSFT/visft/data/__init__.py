"""Data: checks of COCO files before training, mappers, deterministic loaders, the demo world."""

from visft.data.datasets.captions import register_coco_captions
from visft.data.datasets.catalog import check_data_set, check_registered, register_own_data
from visft.data.images import ImageError, read_rgb
from visft.data.labelled_images import LabelledImages, load_labelled
from visft.data.loader import build_test_loader, build_train_loader
from visft.data.mapper import ViSFTMapper, build_test_mapper
from visft.data.task_mixing import build_stage_loader

__all__ = [
    "LabelledImages",
    "ImageError",
    "ViSFTMapper",
    "build_stage_loader",
    "build_test_loader",
    "build_test_mapper",
    "build_train_loader",
    "check_data_set",
    "check_registered",
    "load_labelled",
    "read_rgb",
    "register_all",
    "register_own_data",
]


def register_all() -> None:
    """Register the demo world, Objects365 and COCO's caption files in detectron2's catalogs. Reads no annotations."""
    from visft.data.datasets import demo_world
    from visft.data.datasets.objects365 import register_objects365

    demo_world.register()
    register_objects365()
    register_coco_captions()
