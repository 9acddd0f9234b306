"""Annotation files near COCO's format: what sets each apart, as one value that checks and readers share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from detectron2.data import Metadata


def _unchanged(value: str) -> str:
    return value


@dataclass(frozen=True)
class Layout:
    """What sets a data set's file apart from COCO's, which is the default.

    Attributes:
        name: of the format.
        image_key: of an image: what says where its file is.
        image_path: from that value to the path under the data set's `image_root`; "" for an image known to be missing.
        record_keys: of an image: what its record gets as well, if it is there.
        own_classes: the file says what the classes are; else the data set's name does.
        strict: boxes lie in their images and have an area, as COCO's tools write them. Published files of others have
            boxes over the edge or without area: the mapper clips the former, and drops the latter.
        federated: for evaluation, images and categories say what is known of which class.
    """

    name: str = "COCO"
    image_key: str = "file_name"
    image_path: Callable[[str], str] = _unchanged
    record_keys: tuple[str, ...] = ()
    own_classes: bool = True
    strict: bool = True
    federated: bool = False

    def file_of(self, image: Mapping) -> str:
        """The path of an entry of `images` under the data set's `image_root`; "" if it is known to be missing."""
        return self.image_path(image[self.image_key])


def last_two_parts(path: str) -> str:
    """`train2017/1.jpg` of `http://images.cocodataset.org/train2017/1.jpg`."""
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
    """The layout of a data set's annotation file: its metadata's `annotation_format`, else by `evaluator_type`."""
    return meta.get("annotation_format") or (LVIS if meta.get("evaluator_type") == "lvis" else COCO)


def class_indices(meta: Metadata) -> dict[int, int]:
    """Indices of the classes that a data set's name stands for, by the ids of its file: 1, 2, ... unless it says."""
    ids = meta.get("thing_dataset_id_to_contiguous_id")
    return ids or {index + 1: index for index in range(len(meta.get("thing_classes") or ()))}
