"""Checks of registered data sets before training, and registration of own data from config keys."""

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from visft.classes.dataset_classes import places_by_name
from visft.data.datasets.captions import load_captioned
from visft.data.datasets.coco import PackedRecords, load_coco_json, packed_coco
from visft.data.datasets.coco_json import entries_of, read_json, some
from visft.data.datasets.layouts import COCO, Layout, class_indices, layout_of
from visft.data.datasets.shards import ShardRecords, load_shards
from visft.data.headers import ImageRules, check_images
from visft.data.validation import CocoSummary, check_content, summary_of
from visft.errors import ConfigError, DataError

OWN_TRAIN = "visft_own_train"
OWN_TEST = "visft_own_test"
OWN_SHARDS = "visft_own_shards"
"""Names of the data sets of VISFT.DATA."""

_as_stored: dict[tuple, bool] = {}
"""Results of `check_registered` by data set, state of its file, and rules."""


def check_data_set(cfg: CfgNode, name: str) -> None:
    """Check a data set of a config for its use: training, evaluation, or both.

    Repeated calls are cheap, because an unchanged file is not read again.

    Raises:
        DataError: as in `check_registered`, or its classes do not match those of `DATASETS.TRAIN[0]`, which the heads
            learn. For training, the lists must be equal. For evaluation, the heads must know each class by its name,
            unless they are evaluated with the names of the test set.
    """
    rules = ImageRules.of(cfg)
    if name in cfg.DATASETS.TRAIN:
        check_registered(name, train=True, masks=_needs_masks(cfg), rules=rules)
    if name in cfg.DATASETS.TEST:
        check_registered(name, train=False, masks=_needs_masks(cfg), rules=rules)
    if name not in cfg.DATASETS.TRAIN and _names_any_class(cfg):
        return
    first = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else name
    ours, theirs = (MetadataCatalog.get(n).get("thing_classes") for n in (name, first))
    if ours is None or theirs is None:
        return
    if name not in cfg.DATASETS.TRAIN:
        places_by_name(theirs, name, ours)
    elif list(ours) != list(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        raise DataError(
            f"{name}: its {len(ours)} classes are not the {len(theirs)} of {first} "
            f"({'only in one of them: ' + some(odd) if odd else 'they are in another order'}); "
            "use data sets with the same list of categories"
        )


def _names_any_class(cfg: CfgNode) -> bool:
    """Whether all heads are evaluated with the names of the test set."""
    node = cfg.MODEL.get("VISFT")
    if node is None or cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        return False
    heads = [node[head.upper()].HEAD for head in node.HEADS]
    return tuple(node.OPEN_VOCABULARY.NAMES) == ("test",) or set(heads) == {"RegionTextHead"}


def _needs_masks(cfg: CfgNode) -> bool:
    """Whether the model learns masks, so that every annotation needs one."""
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        return cfg.MODEL.MASK_ON
    from visft.modeling.heads import VISFT_HEADS_REGISTRY

    node = cfg.MODEL.VISFT
    classes = [VISFT_HEADS_REGISTRY.get(node[head.upper()].HEAD) for head in node.HEADS]
    return any(head.needs_masks(cfg) for head in classes)


def check_registered(
    name: str, *, train: bool, masks: bool = True, rules: ImageRules | None = None, again: bool = True
) -> bool:
    """Check a data set in detectron2's DatasetCatalog: its annotations (`check_annotations`), then its image headers.

    Args:
        name: a registered name.
        train: True: the data set must have something to learn from. False: it must have what COCO's evaluation reads.
        masks: whether masks are used (see `check_coco_json`).
        rules: which images may be bad (default: none).
        again: False: skip images that this process has already checked with the same file and rules.

    Returns:
        Whether annotations refer to the stored pixels where an image's size is ambiguous (see `check_images`).

    Raises:
        DataError: the name is unknown, a file is missing, or an annotation (see `check_coco_json`) or image is broken.
    """
    images = check_annotations(name, train=train, masks=masks)
    meta = MetadataCatalog.get(name)
    json_file, rules = meta.get("json_file") or meta.get("caption_json") or "", rules or ImageRules()
    there = os.path.isfile(json_file)
    stat = os.stat(json_file) if there else None
    key = (name, json_file, stat and (stat.st_mtime_ns, stat.st_size), rules)
    if not again and there and key in _as_stored:
        return _as_stored[key]
    if images is None:
        images, json_file = DatasetCatalog.get(name), json_file if there else ""
    if isinstance(images, ShardRecords):
        images.check(name, rules.max_pixels, rules.skip_broken)
        return False
    images = [image for image in images if "://" not in os.fspath(image["file_name"])]
    _as_stored[key] = check_images(images, rules, name=name, json_file=json_file)
    return _as_stored[key]


def check_annotations(name: str, *, train: bool, masks: bool = True) -> Iterable[dict] | None:
    """Check a data set's annotations. Missing metadata (classes and their ids) is filled in from the annotation file.

    For a data set in neither COCO's nor LVIS's format, this only checks that its files exist.

    Returns:
        `file_name`, `width` and `height` of its images, if it has an annotation file.

    Raises:
        DataError: as in `check_registered`.
    """
    _check_name(name)
    meta = MetadataCatalog.get(name)
    for key in ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root", "caption_json"):
        path = meta.get(key)
        if key == "caption_json" and name not in (OWN_TRAIN, OWN_TEST):
            continue  # captions of COCO and of the demo world are optional
        if path and "://" not in path and not os.path.exists(path):
            raise DataError(_what_to_put_where(name, path))
    json_file = meta.get("json_file")
    if not json_file or "://" in json_file:
        return None
    layout = layout_of(meta)
    # The files of test sets with secret annotations have no `annotations`.
    annotated = train or (layout.own_classes and not name.startswith("coco_2017_test"))
    summary = check_coco_json(json_file, train=train, annotated=annotated, masks=masks, layout=layout)
    expected = meta.get("thing_classes")
    if not layout.own_classes:
        known = class_indices(meta)
        if not known.keys() >= set(summary.category_ids):
            raise DataError(
                f"{json_file}: its {len(summary.category_ids)} category ids ({some(summary.category_ids)}) are not "
                f"among the {len(known)} that `{name}` stands for ({some(sorted(known))}); register the file under a "
                "name of its own"
            )
    elif expected is None:
        ids = {dataset_id: i for i, dataset_id in enumerate(summary.category_ids)}
        meta.set(thing_classes=list(summary.classes), thing_dataset_id_to_contiguous_id=ids)
    elif tuple(expected) != summary.classes:
        raise DataError(
            f"{json_file}: its {len(summary.classes)} categories ({some(summary.classes)}) are not the "
            f"{len(expected)} that `{name}` stands for ({some(expected)}); set VISFT.DATA.TRAIN_JSON or "
            "VISFT.DATA.TEST_JSON to the file, which take the classes from it"
        )
    return _images_of(json_file, meta.get("image_root") or "", layout)


def check_coco_json(
    json_file: str, *, train: bool, annotated: bool = True, masks: bool = True, layout: Layout = COCO
) -> CocoSummary:
    """Check an annotation file. A file that has not changed since it passed is not read again.

    Args:
        json_file: path of the annotation file.
        train: whether the file needs at least one annotation that is not a crowd.
        annotated: whether the file needs `annotations`.
        masks: whether masks are used. Then all annotations or none must have one (for training, except crowds).
        layout: of the file.

    Raises:
        DataError: names the file, the first wrong entry (annotations by their id), what is wrong and what was expected.
    """
    summary, _ = _checked(json_file, layout)
    if annotated and not summary.annotated:
        entries_of(json_file, {}, "annotations")
    if train and not summary.learnable:
        raise DataError(
            f"{json_file}: none of its {summary.images} images has an annotation that is not a crowd, so there is "
            "nothing to train on; expected at least one"
        )
    if not train and summary.annotated and (fault := summary.no_area or summary.not_federated):
        raise DataError(f"{json_file}: {fault}")
    unmasked = summary.unmasked or ("" if train else summary.unmasked_crowd)
    if masks and summary.masked and unmasked:
        raise DataError(
            f"{json_file}: {unmasked} while {summary.masked} has a mask; add masks to all annotations, remove all "
            "masks, or leave out the heads that learn masks"
        )
    return summary


def _checked(json_file: str, layout: Layout) -> tuple[CocoSummary, Sequence[dict]]:
    """Return the summary, and `file_name`, `width` and `height` of the images. A changed file is read again."""
    try:
        stat = os.stat(json_file)
    except OSError as error:
        raise DataError(f"{json_file}: the annotation file cannot be opened ({error.strerror})") from None
    return _read(json_file, layout, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _read(json_file: str, layout: Layout, _mtime_ns: int, _size: int) -> tuple[CocoSummary, Sequence[dict]]:
    file = packed_coco(json_file, layout)
    if file is not None:
        return summary_of(file.summary), file.rows("outlines")
    content = read_json(json_file)
    summary = check_content(json_file, content, layout=layout)
    sides = ("width", "height")
    images = (
        {"file_name": layout.file_of(i), **{side: i[side] for side in sides}} for i in content["images"]
    )
    return summary, tuple(image for image in images if image["file_name"])


def _images_of(json_file: str, image_root: str, layout: Layout) -> Iterable[dict]:
    """Yield `file_name`, `width` and `height` of a checked file's images."""
    for image in _checked(json_file, layout)[1]:
        yield image | {"file_name": os.path.join(image_root, image["file_name"])}


def register_own_data(cfg: CfgNode) -> None:
    """Register the data of `VISFT.DATA.*` and put it into `cfg.DATASETS`. Does nothing if these keys are empty.

    With only a training set, `DATASETS.TEST` becomes empty, because another data set has other classes. Shards come
    after TRAIN_JSON's data set, whose classes the heads learn. `DATASETS.TRAIN` stays if it already names them.

    Raises:
        ConfigError: an annotation or caption file is given without the folder of images, or the reverse.
    """
    data = cfg.VISFT.DATA
    for split in ("TRAIN", "TEST"):
        files = [key for key in (f"{split}_JSON", f"{split}_CAPTIONS") if data[key]]
        if bool(files) != bool(data[f"{split}_IMAGES"]):
            there, missing = (files[0], f"{split}_IMAGES") if files else (f"{split}_IMAGES", f"{split}_JSON")
            raise ConfigError(
                f"VISFT.DATA.{there} is set and VISFT.DATA.{missing} is not: "
                "set both an annotation file (or a caption file) and the folder of its images"
            )
    if not (data.TRAIN_IMAGES or data.TEST_IMAGES or data.TRAIN_SHARDS):
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    if data.TRAIN_IMAGES:
        _register_own(OWN_TRAIN, data.TRAIN_JSON, data.TRAIN_IMAGES, data.TRAIN_CAPTIONS)
        cfg.DATASETS.TRAIN = (OWN_TRAIN,)
        cfg.DATASETS.TEST = ()
    if data.TRAIN_SHARDS:
        _register(OWN_SHARDS, functools.partial(load_shards, data.TRAIN_SHARDS))
        if data.TRAIN_IMAGES:
            cfg.DATASETS.TRAIN = (OWN_TRAIN, OWN_SHARDS)
        elif OWN_SHARDS not in cfg.DATASETS.TRAIN:
            cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (OWN_SHARDS,), ()
    if data.TEST_IMAGES:
        _register_own(OWN_TEST, data.TEST_JSON, data.TEST_IMAGES, data.TEST_CAPTIONS)
        cfg.DATASETS.TEST = (OWN_TEST,)
    if frozen:
        cfg.freeze()


def _register_own(name: str, json_file: str, image_root: str, caption_json: str) -> None:
    if json_file:
        _register(name, functools.partial(_load_own, name, json_file, image_root))
        MetadataCatalog.get(name).set(json_file=json_file, evaluator_type="coco")
    else:
        _register(name, functools.partial(load_captioned, caption_json, image_root))
    MetadataCatalog.get(name).set(image_root=image_root, caption_json=caption_json)


def _register(name: str, load: Callable[[], Sequence[dict]]) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)


def _load_own(name: str, json_file: str, image_root: str) -> list[dict] | PackedRecords:
    check_annotations(name, train=name == OWN_TRAIN, masks=False)
    return load_coco_json(json_file, image_root, name)


def _check_name(name: str) -> None:
    known = DatasetCatalog.list()
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else "register it, or set VISFT.DATA.* for your own data"
    raise DataError(f"DATASETS: no data set is registered as `{name}`; {hint}")


def _what_to_put_where(name: str, path: str) -> str:
    if name in (OWN_TRAIN, OWN_TEST):
        split = "TRAIN" if name == OWN_TRAIN else "TEST"
        keys = [f"VISFT.DATA.{split}_{end}" for end in ("JSON", "IMAGES", "CAPTIONS")]
        return f"{path} is not there; correct {keys[0]}, {keys[1]} or {keys[2]}"
    if name.startswith("visft_demo"):
        return (
            f"{name}: {path} is not there; make the demo world with `python tools/make_demo_data.py`, or set "
            "VISFT_DEMO_DATA to its folder"
        )
    meta = MetadataCatalog.get(name)
    root = os.environ.get("DETECTRON2_DATASETS")
    where = (
        f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is not set, so it is ./datasets"
    )
    return (
        f"{name}: {path} is not there; put the annotations at {meta.get('json_file')} and the images into "
        f"{meta.get('image_root')}, or set DETECTRON2_DATASETS to the folder that contains them ({where})"
    )
