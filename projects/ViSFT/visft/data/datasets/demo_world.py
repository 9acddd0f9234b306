"""The data sets of the demo world in detectron2's catalogs; the package `demoworld` makes their scenes."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from visft.errors import DataError

if TYPE_CHECKING:
    from demoworld.dataset import DemoData

NAMES = {"train": "visft_demo_train", "val": "visft_demo_val", "unseen": "visft_demo_unseen"}
"""`unseen` has things of no category of the other two, with names of their own."""


def default_root() -> Path:
    """`$VISFT_DEMO_DATA`, else `visft_demo` in `$DETECTRON2_DATASETS` (default `datasets`)."""
    own = os.environ.get("VISFT_DEMO_DATA")
    return Path(own) if own else Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "visft_demo"


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Within the block, turn errors of `demoworld` into a DataError."""
    from demoworld.errors import DemoWorldError

    try:
        yield
    except DemoWorldError as error:
        raise DataError(str(error)) from error


def make(root: str | Path, **numbers: int) -> "DemoData":
    """Make the demo world with `demoworld.dataset.make`.

    Raises:
        DataError: `root` contains files from elsewhere, or numbers are out of range.
    """
    from demoworld import dataset

    with errors():
        return dataset.make(root, **numbers)


def _load(data: "DemoData", split: str, name: str) -> list[dict]:
    if not data.instances(split).is_file():
        raise DataError(
            f"{name}: {data.instances(split)} is not there; make the demo world with "
            f"`python tools/make_demo_data.py --output {data.root}`, or set VISFT_DEMO_DATA to its folder"
        )
    from visft.data.datasets.coco import load_coco_json

    return load_coco_json(str(data.instances(split)), str(data.images(split)), name)


def register(root: str | Path | None = None) -> None:
    """Register `visft_demo_train`, `_val` and `_unseen` in detectron2's catalogs, replacing earlier entries.

    Files are read only when a data set is used. Masks are run-length encoded, so stock configs need
    `INPUT.MASK_FORMAT bitmask`. Metadata: `thing_classes`, `thing_dataset_id_to_contiguous_id`, `json_file`,
    `image_root`, `caption_json`, `evaluator_type`.

    Args:
        root: the folder given to `make`. The default is `default_root()`.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from demoworld.catalogue import COCO_CATEGORIES
    from demoworld.dataset import DemoData

    data = DemoData(Path(root) if root is not None else default_root())
    for split, name in NAMES.items():
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
        DatasetCatalog.register(name, functools.partial(_load, data, split, name))
        if (
            split != "unseen"
        ):  # the names of `unseen` need the package of drawings; loading its file sets them
            MetadataCatalog.get(name).set(
                thing_classes=[c.name for c in COCO_CATEGORIES],
                thing_dataset_id_to_contiguous_id={c.id: i for i, c in enumerate(COCO_CATEGORIES)},
            )
        MetadataCatalog.get(name).set(
            json_file=str(data.instances(split)),
            image_root=str(data.images(split)),
            caption_json=str(data.captions(split)),
            evaluator_type="coco",
        )
