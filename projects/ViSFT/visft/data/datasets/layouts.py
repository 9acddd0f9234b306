"""Annotation formats similar to COCO's. Checks and readers share the description of each format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from detectron2.data import Metadata


def _unchanged(value: str) -> str:
    return value


@dataclass(frozen=True)
class Layout:
    """The differences between a data set's file and COCO's, which is the default.

    Attributes:
        name: of the format.
        image_key: the key of an image that locates its file.
        image_path: maps that value to the path under the data set's `image_root`, or to "" if the image is known to be
            missing.
        record_keys: optional keys of an image that its record also gets.
        own_classes: whether the file defines the classes. Otherwise the data set's name does.
        strict: whether boxes must lie inside their images and have an area, as in COCO. Other published files have
            boxes beyond the edge, which the mapper clips, and boxes without area, which it drops.
        federated: whether evaluation reads from images and categories which classes are annotated exhaustively.
    """

    name: str = "COCO"
    image_key: str = "file_name"
    image_path: Callable[[str], str] = _unchanged
    record_keys: tuple[str, ...] = ()
    own_classes: bool = True
    strict: bool = True
    federated: bool = False

    def file_of(self, image: Mapping) -> str:
        """Return the path of an entry of `images` under the data set's `image_root`, or "" if it is known missing."""
        return self.image_path(image[self.image_key])


def last_two_parts(path: str) -> str:
    """Return `train2017/1.jpg` for `http://images.cocodataset.org/train2017/1.jpg`."""
    return "/".join(path.split("/")[-2:])


COCO = Layout()

LVIS = Layout(
    "LVIS",
    "coco_url",
    last_two_parts,
    record_keys=("not_exhaustive_category_ids", "neg_category_ids"),
    own_classes=False,
    strict=False,
    federated=True,
)


def layout_of(meta: Metadata) -> Layout:
    """Return the layout of a data set's file: the metadata's `annotation_format`, else by `evaluator_type`."""
    return meta.get("annotation_format") or (LVIS if meta.get("evaluator_type") == "lvis" else COCO)


def class_indices(meta: Metadata) -> dict[int, int]:
    """Map the category ids of a data set's file to class indices. Without such metadata, the ids are 1, 2, ..."""
    ids = meta.get("thing_dataset_id_to_contiguous_id")
    return ids or {index + 1: index for index in range(len(meta.get("thing_classes") or ()))}
