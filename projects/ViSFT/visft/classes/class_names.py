"""Class names of data sets as phrases for a text encoder."""

import re
from collections.abc import Sequence

from detectron2.data import Metadata

_PANOPTIC_SUFFIX = re.compile(r"-(?:merged|other|stuff)\b")


def words(name: str) -> tuple[str, ...]:
    """Return a class name in plain words, or several if the name lists alternatives.

    `wine_glass` -> `wine glass`; LVIS's `bow_(weapon)` -> `bow weapon`; Objects365's `Cabinet/shelf` -> `Cabinet`,
    `shelf`; COCO's panoptic `wall-other-merged` -> `wall`.
    """
    plain = _PANOPTIC_SUFFIX.sub("", name)
    found = []
    for part in plain.split("/"):
        part = " ".join(re.sub(r"[_()]", " ", part).split())
        if part and part not in found:
            found.append(part)
    return tuple(found) or (name,)


def stuff_words(name: str) -> tuple[str, ...]:
    """Like `words`, for COCO's stuff classes, which join words with hyphens: `floor-wood` -> `floor wood`."""
    return words(_PANOPTIC_SUFFIX.sub("", name).replace("-", " "))


def synonyms(metadata: Metadata) -> list[tuple[str, ...]]:
    """Return the names of each class in plain words, in the order of `thing_classes`.

    They come from the metadata's `class_synonyms` (a list of names for each class) if present, for LVIS v1 from
    detectron2's table of synonyms, and otherwise from `thing_classes`.
    """
    classes: Sequence[str] = metadata.get("thing_classes") or ()
    names = metadata.get("class_synonyms")
    if names is None and metadata.get("evaluator_type") == "lvis":
        from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

        table = [row["synonyms"] for row in sorted(LVIS_CATEGORIES, key=lambda row: row["id"])]
        if [row[0] for row in table] == list(classes):
            names = table
    if names is None:
        names = [(name,) for name in classes]
    return [tuple(dict.fromkeys(word for name in row for word in words(name))) for row in names]
