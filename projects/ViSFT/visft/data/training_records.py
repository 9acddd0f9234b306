"""Checked records of a run's data sets, with captions, and without images that have nothing to learn from."""

import itertools
import logging
from collections.abc import Iterable, Sequence

from visft.data.datasets.captions import captions_of
from visft.data.datasets.catalog import check_registered
from visft.data.datasets.coco import JoinedRecords, PackedRecords, records_of
from visft.data.datasets.shards import ShardRecords
from visft.data.headers import ImageRules
from visft.data.masks import all_masked, usable
from visft.data.validation import CocoSummary
from visft.errors import DataError

logger = logging.getLogger(__name__)


def load_records(
    names: tuple[str, ...],
    *,
    train: bool,
    filter_empty: bool = False,
    rules: ImageRules | None = None,
    captions: bool = True,
) -> Sequence[dict]:
    """Return checked dataset dicts of registered data sets. For training, they have `captions` and `has_masks`.

    Args:
        names: names in detectron2's DatasetCatalog.
        train: whether to check what training needs, instead of what evaluation needs.
        rules: which images may be bad (default: none).
        filter_empty: drop images whose annotations are all crowds. If such an image has captions, drop only its
            annotations.
        captions: whether captions are needed.
    """
    parts: list[Sequence[dict]] = []
    for name in names:
        as_stored = check_registered(name, train=train, masks=False, rules=rules, again=False)
        found = records_of(name)
        if isinstance(found, ShardRecords):
            parts.append(found)  # complete as they are
            continue
        if as_stored and isinstance(found, PackedRecords):
            found = found.labelled({"as_stored": True})
        elif as_stored:
            found = [r | {"as_stored": True} for r in found]
        if train and isinstance(found, PackedRecords):
            has_masks = _are_masked(found.summary, name)
            found = found.labelled({"has_masks": has_masks}, captions_of(name) if captions else None)
            if filter_empty:
                kept, bare = _not_empty(found.outlines(), name)
                found = found.kept(kept, bare)
        elif train:
            has_masks = _have_masks(found, name)
            found = [r | {"has_masks": has_masks} for r in found]
            if captions:
                texts = captions_of(name)
                found = [
                    r | {"captions": texts.get(r.get("image_id")) or r.get("captions") or []} for r in found
                ]
            if filter_empty:
                found = _without_empty(found, name)
        parts.append(found)
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError(
            f"{', '.join(names) or 'DATASETS'}: the data set is empty; expected at least one image"
        )
    if all(isinstance(part, list) for part in parts):
        return list(itertools.chain(*parts))
    return parts[0] if len(parts) == 1 else JoinedRecords(parts)


def _have_masks(records: list[dict], name: str) -> bool:
    """Whether all annotations have masks. Otherwise, masks are not used."""
    annotations = [a for record in records for a in record.get("annotations", ())]
    if all_masked(annotations):
        return True
    masks = sum(usable(a.get("segmentation")) is not None for a in annotations)
    if masks:
        logger.warning(
            "%s: only %d of %d annotations have masks, so only boxes are used", name, masks, len(annotations)
        )
    return False


def _are_masked(summary: CocoSummary, name: str) -> bool:
    """Like `_have_masks`."""
    if summary.masked and summary.unmasked:
        logger.warning("%s: not all annotations have masks, so only boxes are used", name)
    return bool(summary.learnable) and not summary.unmasked


def _without_empty(records: list[dict], name: str) -> list[dict]:
    kept, bare = _not_empty(records, name)
    return [
        {key: value for key, value in records[i].items() if key != "annotations"} if i in bare else records[i]
        for i in kept
    ]


def _not_empty(records: Iterable[dict], name: str) -> tuple[list[int], set[int]]:
    """Return the indices of records with something to learn from, and of those among them with only captions."""
    kept, bare, dropped = [], set(), 0
    for index, record in enumerate(records):
        if "annotations" in record and all(a.get("iscrowd", 0) for a in record["annotations"]):
            if not record.get("captions"):
                dropped += 1
                continue
            bare.add(index)
        kept.append(index)
    if bare or dropped:
        logger.info(
            "%s: %d of %d images have nothing but crowds annotated; %d are left out, the others have captions",
            name,
            len(bare) + dropped,
            len(kept) + dropped,
            dropped,
        )
    return kept, bare
