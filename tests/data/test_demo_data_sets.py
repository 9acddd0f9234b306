"""The demo world's data sets in detectron2's catalogs."""

import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from demoworld import catalogue, unseen_things
from visft.data.datasets import demo_world
from visft.errors import DataError


@pytest.fixture
def registered(tmp_path):
    """A small world under the registered names; the usual places are registered again afterwards."""
    demo_world.make(tmp_path / "world", num_train=3, num_val=2, num_unseen=4, seed=3)
    demo_world.register(tmp_path / "world")
    yield
    demo_world.register()


def test_registered_names_load_through_detectron2(registered):
    records = DatasetCatalog.get("visft_demo_train")
    metadata = MetadataCatalog.get("visft_demo_train")
    assert len(records) == 3 and metadata.thing_classes == [c.name for c in catalogue.COCO_CATEGORIES]
    assert max(a["category_id"] for r in records for a in r["annotations"]) < 62
    assert os.path.isfile(metadata.caption_json) and os.path.isfile(records[0]["file_name"])
    assert len(DatasetCatalog.get("visft_demo_unseen")) == 4
    assert MetadataCatalog.get("visft_demo_unseen").thing_classes == list(unseen_things.cast().names)


def test_a_world_that_is_not_there_or_not_ours(registered, tmp_path):
    demo_world.register(tmp_path / "nothing")
    with pytest.raises(DataError, match="make_demo_data"):
        DatasetCatalog.get("visft_demo_train")
    (tmp_path / "world" / "demo_world.json").unlink()
    with pytest.raises(DataError, match="was not made by make_demo_data"):
        demo_world.make(tmp_path / "world")


def test_that_ids_with_gaps_are_mapped_is_no_news(registered, caplog):
    """The demo world has COCO's ids; detectron2 itself warns that it maps them."""
    metadata = MetadataCatalog.get("visft_demo_train")
    assert max(metadata.thing_dataset_id_to_contiguous_id) > len(metadata.thing_classes)
    DatasetCatalog.get("visft_demo_train")
    assert "Category ids" not in caplog.text
    load_coco_json(metadata.json_file, metadata.image_root, "stock_loader")
    assert "Category ids in annotations are not in [1, #categories]" in caplog.text
