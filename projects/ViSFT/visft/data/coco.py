"""COCO annotation files: checked whole before training, and registered from config keys without code."""

import difflib
import functools
import logging
import os
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from visft.data.captions import load_captioned
from visft.data.coco_json import (
    are_numbers,
    entries_of,
    files_in,
    is_box,
    is_id,
    is_int,
    is_number,
    is_positive_int,
    is_text,
    name_of,
    read_json,
    require_keys,
    some,
)
from visft.data.published import LVIS, check_published
from visft.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

OWN_TRAIN = "visft_own_train"
OWN_TEST = "visft_own_test"

# A box may reach this many pixels over the picture's edge: annotation tools round, COCO's own included.
_BOX_TOLERANCE = 1.0

# Pictures of COCO's train sets with one box each that has no height (github.com/cocodataset/cocoapi, issue 355). All
# the world trains on these files, so they pass; the mapper drops the two as it drops what a crop leaves empty.
_KNOWN_FLAT = {200365, 550395}


@dataclass(frozen=True)
class CocoSummary:
    """What a checked annotation file holds."""

    classes: tuple[str, ...]
    """Names in the order of their category ids."""
    category_ids: tuple[int, ...]


def check_data_set(cfg: CfgNode, name: str) -> None:
    """Check one of the data sets that a config names, for what it is used for: training, evaluation, or both.

    Cheap when repeated: a file that has not changed is not read again.

    Raises:
        DataError: as `check_registered`, or its classes are not those of `DATASETS.TRAIN[0]`, which the heads have
            (unless what they find is evaluated under the names of the test set).
    """
    if name in cfg.DATASETS.TRAIN:
        check_registered(name, train=True)
    if name in cfg.DATASETS.TEST:
        check_registered(name, train=False)
    if name not in cfg.DATASETS.TRAIN and _names_any_class(cfg):
        return
    first = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else name
    ours, theirs = (MetadataCatalog.get(n).get("thing_classes") for n in (name, first))
    if ours is not None and theirs is not None and list(ours) != list(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        raise DataError(
            f"{name}: its {len(ours)} classes are not the {len(theirs)} of {first} "
            f"({'only in one of them: ' + some(odd) if odd else 'they are in another order'}); "
            "use data sets with the same list of categories"
        )


def _names_any_class(cfg: CfgNode) -> bool:
    """Whether all heads are evaluated under the names of the test set, whatever they were trained on."""
    node = cfg.MODEL.get("VISFT")
    if node is None or cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        return False
    heads = [node[head.upper()].HEAD for head in node.HEADS]
    return tuple(node.OPEN_VOCABULARY.NAMES) == ("test",) or set(heads) == {"RegionTextHead"}


def check_registered(name: str, *, train: bool) -> None:
    """Check a data set by its name in detectron2's DatasetCatalog, whatever the config. Metadata that its annotation
    file gives (classes and their ids) is filled in if it was not there.

    Of data sets that are in neither COCO's nor LVIS's format, only the presence of their files is checked.

    Args:
        name: a registered name.
        train: it must have something to learn from; else it must have what COCO's evaluation reads.

    Raises:
        DataError: the name is unknown, a file is missing, or an annotation is broken (see `check_coco_json`).
    """
    _check_name(name)
    meta = MetadataCatalog.get(name)
    for key in ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root", "caption_json"):
        path = meta.get(key)
        if key == "caption_json" and name not in (OWN_TRAIN, OWN_TEST):
            continue  # of COCO and the demo world a user may have no captions
        if path and "://" not in path and not os.path.exists(path):
            raise DataError(_what_to_put_where(name, path))
    json_file = meta.get("json_file")
    if not json_file or "://" in json_file:
        return
    if meta.get("annotation_format") or meta.get("evaluator_type") == "lvis":
        check_published(meta.get("annotation_format") or LVIS, meta, train=train)
        return
    # Test sets whose annotations are kept secret have a file without any.
    annotated = train or not name.startswith("coco_2017_test")
    summary = check_coco_json(json_file, meta.get("image_root") or "", train=train, annotated=annotated)
    expected = meta.get("thing_classes")
    if expected is None:
        ids = {dataset_id: i for i, dataset_id in enumerate(summary.category_ids)}
        meta.set(thing_classes=list(summary.classes), thing_dataset_id_to_contiguous_id=ids)
    elif tuple(expected) != summary.classes:
        raise DataError(
            f"{json_file}: its {len(summary.classes)} categories ({some(summary.classes)}) are not the "
            f"{len(expected)} that `{name}` stands for ({some(expected)}); give the file as "
            "VISFT.DATA.TRAIN_JSON or VISFT.DATA.TEST_JSON, which take the classes from it"
        )


def register_own_data(cfg: CfgNode) -> None:
    """Register what `VISFT.DATA.*` names and put it into `cfg.DATASETS`; nothing happens when these keys are empty.

    With a training set alone, `DATASETS.TEST` becomes empty: the test set of another data set has other classes.

    Raises:
        ConfigError: an annotation or caption file is given without the folder of pictures, or the reverse.
    """
    data = cfg.VISFT.DATA
    for split in ("TRAIN", "TEST"):
        files = [key for key in (f"{split}_JSON", f"{split}_CAPTIONS") if data[key]]
        if bool(files) != bool(data[f"{split}_IMAGES"]):
            there, missing = (files[0], f"{split}_IMAGES") if files else (f"{split}_IMAGES", f"{split}_JSON")
            raise ConfigError(
                f"VISFT.DATA.{there} is set and VISFT.DATA.{missing} is not: "
                "own data needs an annotation file (or one of captions) and the folder of its pictures"
            )
    if not data.TRAIN_IMAGES and not data.TEST_IMAGES:
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    if data.TRAIN_IMAGES:
        _register_own(OWN_TRAIN, data.TRAIN_JSON, data.TRAIN_IMAGES, data.TRAIN_CAPTIONS)
        cfg.DATASETS.TRAIN = (OWN_TRAIN,)
        cfg.DATASETS.TEST = ()
    if data.TEST_IMAGES:
        _register_own(OWN_TEST, data.TEST_JSON, data.TEST_IMAGES, data.TEST_CAPTIONS)
        cfg.DATASETS.TEST = (OWN_TEST,)
    if frozen:
        cfg.freeze()


def _register_own(name: str, json_file: str, image_root: str, caption_json: str) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    if json_file:
        DatasetCatalog.register(name, functools.partial(_load_own, name, json_file, image_root))
        MetadataCatalog.get(name).set(json_file=json_file, evaluator_type="coco")
    else:
        DatasetCatalog.register(name, functools.partial(load_captioned, caption_json, image_root))
    MetadataCatalog.get(name).set(image_root=image_root, caption_json=caption_json)


def _load_own(name: str, json_file: str, image_root: str) -> list[dict]:
    from detectron2.data.datasets import load_coco_json

    check_registered(name, train=name == OWN_TRAIN)
    return load_coco_json(json_file, image_root, name)


def register_coco_captions() -> None:
    """Tell detectron2's own COCO names where COCO keeps its captions (metadata `caption_json`). Reads no file."""
    for name in DatasetCatalog.list():
        if name.startswith("coco_20") and not name.endswith(("_panoptic", "_separated", "_stuffonly")):
            meta = MetadataCatalog.get(name)
            folder, _, file = (meta.get("json_file") or "").rpartition("instances_")
            if folder:
                meta.caption_json = f"{folder}captions_{file}"


def check_coco_json(json_file: str, image_root: str, *, train: bool, annotated: bool = True) -> CocoSummary:
    """Check a COCO instance file whole. A file that has not changed since it passed is not read again.

    Args:
        json_file: path of the annotation file.
        image_root: folder that `file_name`s are relative to.
        train: something to learn from is required (an annotation that is no crowd). Else what COCO's evaluation
            reads is required (`area`; masks also of crowds if there are any masks).
        annotated: whether `annotations` must be there.

    Raises:
        DataError: names the file, the first entry that is wrong (annotations by their id), what is wrong and
            what was expected.
    """
    try:
        stat = os.stat(json_file)
    except OSError as error:
        raise DataError(f"{json_file}: the annotation file cannot be opened ({error.strerror})") from None
    return _check(json_file, image_root, train, annotated, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _check(
    json_file: str, image_root: str, train: bool, annotated: bool, _mtime_ns: int, _size: int
) -> CocoSummary:
    content = read_json(json_file)
    categories = _check_categories(json_file, entries_of(json_file, content, "categories"))
    sizes = _check_images(json_file, entries_of(json_file, content, "images"), image_root)
    if annotated or "annotations" in content:
        annotations = entries_of(json_file, content, "annotations")
    else:
        annotations = []
    _check_annotations(json_file, annotations, sizes, categories, train)
    if train and all(a.get("iscrowd", 0) for a in annotations):
        raise DataError(
            f"{json_file}: none of its {len(sizes)} pictures has an annotation that is no crowd, so there is "
            "nothing to train on; expected at least one"
        )
    logger.info("%s: %d pictures, %d annotations, nothing wrong", json_file, len(sizes), len(annotations))
    ids = tuple(sorted(categories))
    return CocoSummary(classes=tuple(categories[i] for i in ids), category_ids=ids)


def _check_categories(path: str, entries: list) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        where = name_of(entry, number, "category", "categories")
        require_keys(path, where, entry, {"id": is_int, "name": is_text})
        if entry["id"] in categories:
            raise DataError(f"{path}: category id {entry['id']} occurs twice; ids must be unique")
        categories[entry["id"]] = entry["name"]
    if not categories:
        raise DataError(f"{path}: `categories` is empty; expected at least one entry with `id` and `name`")
    return categories


def _check_images(path: str, entries: list, image_root: str) -> dict[int, tuple[int, int]]:
    """Returns (width, height) by image id."""
    sizes: dict[int, tuple[int, int]] = {}
    missing, first_missing = 0, ""
    listing = functools.lru_cache(maxsize=None)(files_in)
    for number, entry in enumerate(entries):
        where = name_of(entry, number, "image", "images")
        keys = {"id": is_id, "file_name": is_text, "width": is_positive_int, "height": is_positive_int}
        require_keys(path, where, entry, keys)
        if entry["id"] in sizes:
            raise DataError(f"{path}: image id {entry['id']} occurs twice; ids must be unique")
        sizes[entry["id"]] = (entry["width"], entry["height"])
        folder, name = os.path.split(os.path.join(image_root, entry["file_name"]))
        if name not in listing(folder):
            missing += 1
            first_missing = first_missing or os.path.join(folder, name)
    if not sizes:
        raise DataError(
            f"{path}: the data set is empty (`images` has no entries); expected at least one picture"
        )
    if missing:
        raise DataError(
            f"{path}: {missing} of its {len(sizes)} pictures are not on disk, the first is {first_missing}; "
            f"put them into {image_root or 'the folder of pictures'}, or take them out of the file"
        )
    return sizes


def _check_annotations(
    path: str, entries: list, sizes: dict[int, tuple[int, int]], categories: dict[int, str], train: bool
) -> None:
    seen = set()
    with_mask = without_mask = None
    keys = {"id": is_id, "image_id": is_id, "category_id": is_int, "bbox": is_box}
    if not train:
        keys["area"] = is_number
    for number, entry in enumerate(entries):
        where = name_of(entry, number)
        require_keys(path, where, entry, keys)
        # detectron2 lets COCO 2014's minival repeat ids, which it is known to do.
        if entry["id"] in seen and "minival" not in path:
            raise DataError(f"{path}: annotation id {entry['id']} occurs twice; ids must be unique")
        seen.add(entry["id"])
        size = sizes.get(entry["image_id"])
        if size is None:
            raise DataError(
                f"{path}: {where} is on image_id {entry['image_id']}, which is not among the file's `images`"
            )
        if entry["category_id"] not in categories:
            raise DataError(
                f"{path}: {where} has category_id {entry['category_id']}, which is not among the file's "
                f"{len(categories)} `categories` (ids {some(sorted(categories))})"
            )
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{path}: {where} has iscrowd {crowd!r}; expected 0 or 1")
        if entry.get("ignore", 0):
            raise DataError(
                f"{path}: {where} has `ignore` set, which COCO does not have; use iscrowd 1 instead"
            )
        _check_box(path, where, entry, size)
        segmentation = entry.get("segmentation")
        if segmentation:
            _check_mask(path, where, segmentation, size)
            with_mask = with_mask or where
        elif not (crowd and train):
            without_mask = without_mask or where
    if with_mask and without_mask:
        raise DataError(
            f"{path}: {without_mask} has no segmentation while {with_mask} has one; give all annotations masks, or none"
        )


def _check_box(path: str, where: str, entry: dict, size: tuple[int, int]) -> None:
    x, y, w, h = entry["bbox"]
    width, height = size
    if w <= 0 or h <= 0:
        if h == 0 < w and entry["image_id"] in _KNOWN_FLAT:
            return
        raise DataError(
            f"{path}: {where} has a box without area, bbox {entry['bbox']}; expected [x, y, width, height] with "
            "width and height above 0: correct it or take it out"
        )
    over = max(-x, -y, x + w - width, y + h - height)
    if over > _BOX_TOLERANCE:
        raise DataError(
            f"{path}: {where} has a box that reaches {over:g} px out of its picture, bbox {entry['bbox']} in "
            f"{width} x {height}; expected [x, y, width, height] in pixels inside the picture"
        )


def _check_mask(path: str, where: str, segmentation: object, size: tuple[int, int]) -> None:
    reason = _mask_fault(segmentation, size)
    if reason:
        raise DataError(
            f"{path}: {where} has a mask that does not decode: {reason}; expected polygons "
            "[[x1, y1, x2, y2, ...], ...] or run lengths {size, counts}"
        )


def _mask_fault(segmentation: object, size: tuple[int, int]) -> str:
    width, height = size
    if isinstance(segmentation, list):
        if not all(isinstance(p, list) and are_numbers(p) for p in segmentation):
            return "a polygon is not a list of finite numbers"
        if any(len(p) % 2 for p in segmentation):
            return "a polygon has an odd count of coordinates"
        # A sliver of one or two points beside a whole polygon is dropped by detectron2, as by COCO's own tools.
        return "" if any(len(p) >= 6 for p in segmentation) else "no polygon has three points"
    if not isinstance(segmentation, dict):
        return f"it is of type {type(segmentation).__name__}"
    if list(segmentation.get("size") or []) != [height, width]:
        return f"its size is {segmentation.get('size')}, the picture's [height, width] is {[height, width]}"
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _run_lengths(counts)
    if not isinstance(counts, list) or not all(is_int(c) and c >= 0 for c in counts):
        return "its counts are no run lengths"
    if sum(counts) != width * height:
        return f"its run lengths cover {sum(counts)} of {width * height} pixels"
    return ""


def _run_lengths(text: str) -> list[int] | None:
    """Run lengths from COCO's compressed string; None if it is none. pycocotools trusts the string: a broken one makes
    it write past its buffers, so it must not see one.

    Five bits a character from '0' on, lowest first, bit 5 set when more follow, sign extended; from the third run
    on, the difference to the run before the previous is stored (pycocotools, `rleFrString`).
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return None if shift else runs


def _check_name(name: str) -> None:
    known = DatasetCatalog.list()
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else "register it, or give own data by VISFT.DATA.*"
    raise DataError(f"DATASETS: no data set is registered as `{name}`; {hint}")


def _what_to_put_where(name: str, path: str) -> str:
    if name in (OWN_TRAIN, OWN_TEST):
        split = "TRAIN" if name == OWN_TRAIN else "TEST"
        keys = [f"VISFT.DATA.{split}_{end}" for end in ("JSON", "IMAGES", "CAPTIONS")]
        return f"{path} is not there; correct {keys[0]}, {keys[1]} or {keys[2]}"
    if name.startswith("visft_demo"):
        return (
            f"{name}: {path} is not there; make the demo world with `python tools/make_demo_data.py`, or set "
            "VISFT_DEMO_DATA to the folder that has it"
        )
    meta = MetadataCatalog.get(name)
    root = os.environ.get("DETECTRON2_DATASETS")
    where = (
        f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is not set, so it is ./datasets"
    )
    return (
        f"{name}: {path} is not there; put the annotations at {meta.get('json_file')} and the pictures into "
        f"{meta.get('image_root')}, or set DETECTRON2_DATASETS to the folder that holds them ({where})"
    )
