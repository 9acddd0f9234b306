"""The names and indices of the classes of a data set, or of a run whose data no longer exist."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from visft.checkpoint.copying import some
from visft.classes.class_names import synonyms
from visft.errors import DataError

RUN_PREFIX = "visft_run_"
"""Prefix of data sets that have no images, only the classes that a run recorded."""


def filled_metadata(data_set: str, field: str) -> Metadata:
    """Return the metadata of a registered data set. Loads the data set if they lack `field`."""
    if not MetadataCatalog.get(data_set).get(field):
        DatasetCatalog.get(data_set)
    return MetadataCatalog.get(data_set)


@dataclass(frozen=True)
class Classes:
    """Classes in the order of their contiguous indices."""

    names: tuple[str, ...] = ()
    dataset_ids: tuple[int, ...] = ()
    """The data set's own id of each class; (): unknown."""
    synonyms: tuple[tuple[str, ...], ...] = ()
    """The phrases that a text encoder reads for each class."""
    image_counts: tuple[int, ...] = ()
    """The number of images with each class; (): unknown."""

    @classmethod
    def known(cls, cfg: CfgNode) -> "Classes":
        """The classes of DATASETS.TRAIN[0], which the heads learn, from its metadata alone. Loads nothing."""
        data_set = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
        if data_set not in DatasetCatalog.list():
            return cls()
        metadata = MetadataCatalog.get(data_set)
        names = tuple(metadata.get("thing_classes") or ())
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        counts = sorted(metadata.get("class_image_count") or (), key=lambda count: count["id"])
        return cls(
            names,
            tuple(sorted(ids, key=ids.get)),
            tuple(synonyms(metadata)) if names else (),
            tuple(count["image_count"] for count in counts),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Classes":
        """The inverse of `to_json`."""
        rows = tuple(tuple(row) for row in content["synonyms"])
        counts = tuple(content["image_counts"])
        return cls(tuple(content["names"]), tuple(content["dataset_ids"]), rows, counts)

    def to_json(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return dataclasses.asdict(self)

    def register(self) -> str:
        """Register a data set of these classes without images, for DATASETS.TRAIN, and return its name."""
        name = RUN_PREFIX + hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:12]
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, _no_images)
        known: dict[str, Any] = {"thing_classes": list(self.names), "class_synonyms": list(self.synonyms)}
        if self.dataset_ids:
            known["thing_dataset_id_to_contiguous_id"] = {id_: i for i, id_ in enumerate(self.dataset_ids)}
        if self.image_counts:
            ids = self.dataset_ids or range(1, len(self.image_counts) + 1)
            known["class_image_count"] = [
                {"id": id_, "image_count": count} for id_, count in zip(ids, self.image_counts, strict=True)
            ]
        if self.names:
            MetadataCatalog.get(name).set(**known)
        return name


def _no_images() -> list[dict]:
    return []


def places_by_name(learnt: Sequence[str], data_set: str, names: Sequence[str]) -> dict[int, int]:
    """Map the index of each learned class to its index in a data set. Classes that the data set lacks are left out.

    Args:
        learnt: names of the classes that heads predict, in the order of their indices.
        data_set: its name, for messages.
        names: its classes.

    Raises:
        DataError: the data set has a class that was not learned, or the lists differ and one has a name twice.
    """
    if list(learnt) == list(names):
        return {number: number for number in range(len(names))}
    unknown = [name for name in names if name not in set(learnt)]
    twice = next((name for part in (learnt, names) for name in part if part.count(name) > 1), None)
    if unknown or twice is not None:
        reason = f"it has {some(unknown)}" if unknown else f"{twice} occurs twice"
        raise DataError(
            f"{data_set}: its {len(names)} classes cannot be matched by name with the {len(learnt)} that the heads "
            f"learned ({some(learnt)}): {reason}; rename or remove classes in its annotations, or evaluate with "
            "its names: MODEL.VISFT.OPEN_VOCABULARY.NAMES \"('test',)\""
        )
    return {learnt.index(name): number for number, name in enumerate(names)}
