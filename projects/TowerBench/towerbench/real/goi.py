"""Grounded object identification on real images: what is in this box, or under this mask?

There is one benchmark per kind of region: boxes of things, masks of things, and masks of stuff.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from towerbench import region_pooling
from towerbench.dense_maps import in_chunks
from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.real import maps, regions, sources
from towerbench.real.regions import RegionSet
from towerbench.registry import Context

PROBE_REGIONS = 10_000
"""Number of regions that a probe trains on at most, equally many of each class. Its penalty is chosen on at most a
quarter of this number."""


@dataclass(frozen=True, kw_only=True)
class DataSet(maps.DataSet):
    """Where the regions come from.

    Args:
        load: from `--data`, whether it is for training, and a choice of images to the regions.
        kinds: of regions that it has.
    """

    load: Callable[[Path, bool, regions.Choice], RegionSet]
    kinds: Sequence[str]


def _ade20k(data: Path, train: bool, choice: regions.Choice) -> RegionSet:
    folder = data / "ADEChallengeData2016"
    short, long = ("train", "training") if train else ("val", "validation")
    segments = folder / f"ade20k_panoptic_{short}"
    return regions.panoptic(segments.with_suffix(".json"), folder / "images" / long, segments, choice)


def _objects365(data: Path, train: bool, choice: regions.Choice) -> RegionSet:
    def other(labels: Sequence[Sequence[int]], classes: int) -> list[int]:
        """A probe trains on images that are not tested, because the train split is two million images in 367 GB."""
        tested = set(regions.evenly(labels, classes))
        rest = [number for number in range(len(labels)) if number not in tested]
        return [rest[i] for i in choice([labels[number] for number in rest], classes)]

    json_file = data / "objects365" / "annotations" / "zhiyuan_objv2_val.json"
    return regions.instances(
        json_file,
        data / "objects365" / "val",
        # The names are images/v1/patch8/NAME, but the archive unpacks to patch8/NAME.
        lambda image: "/".join(sources.field(image, "file_name", json_file, str).split("/")[-2:]),
        other if train else choice,
        masks=False,
    )


def _coco(data: Path, train: bool, choice: regions.Choice) -> RegionSet:
    split = "train2017" if train else "val2017"
    json_file = data / "coco" / "annotations" / f"instances_{split}.json"
    return regions.instances(
        json_file,
        data / "coco" / split,
        lambda image: sources.field(image, "file_name", json_file, str),
        choice,
        masks=True,
    )


def _lvis(data: Path, train: bool, choice: regions.Choice) -> RegionSet:
    json_file = data / "lvis" / f"lvis_v1_{'train' if train else 'val'}.json"

    def path(entry: Mapping[str, Any]) -> str:
        # This is COCO's address of the image. Its last two parts are COCO's folder and the file.
        return "/".join(sources.field(entry, "coco_url", json_file, str).split("/")[-2:])

    return regions.instances(json_file, data / "coco", path, choice, masks=True)


_COCO_IMAGES = {"coco/train2017": "COCO's training images", "coco/val2017": "COCO's validation images"}
DATA_SETS = {
    "ade20k": DataSet(
        needs={
            "ADEChallengeData2016/images/validation": "ADE20K's validation images, as the archive unpacks",
            "ADEChallengeData2016/ade20k_panoptic_val.json": "Mask2Former's prepare_ade20k_pan_seg.py writes it",
            "ADEChallengeData2016/ade20k_panoptic_val": "the same script's images of segments",
        },
        trains_on={
            "ADEChallengeData2016/images/training": "ADE20K's training images",
            "ADEChallengeData2016/ade20k_panoptic_train.json": "the same script's",
            "ADEChallengeData2016/ade20k_panoptic_train": "the same script's images of segments",
        },
        load=_ade20k,
        kinds=regions.KINDS,
        item_set="ade20k validation",
    ),
    "objects365": DataSet(
        needs={
            "objects365/annotations/zhiyuan_objv2_val.json": "Objects365 v2's validation annotations",
            "objects365/val": "its validation images, as the archives unpack: patch0, patch1, ...",
        },
        trains_on={},
        load=_objects365,
        kinds=("boxes",),
        item_set="objects365 val",
    ),
    "coco": DataSet(
        needs={
            "coco/annotations/instances_val2017.json": "COCO's annotations",
            "coco/val2017": "COCO's validation images",
        },
        trains_on={
            "coco/annotations/instances_train2017.json": "COCO's annotations",
            "coco/train2017": "COCO's training images",
        },
        load=_coco,
        kinds=("boxes", "thing masks"),
        in_domain=True,
        item_set="coco val2017",
    ),
    "lvis": DataSet(
        needs={"lvis/lvis_v1_val.json": "LVIS v1's annotations", **_COCO_IMAGES},
        trains_on={"lvis/lvis_v1_train.json": "LVIS v1's annotations"},
        load=_lvis,
        kinds=("boxes", "thing masks"),
        in_domain=True,
        item_set="lvis val",
    ),
}


@functools.lru_cache(maxsize=2 * len(DATA_SETS))
def _read(name: str, data: Path, train: bool, stamp: tuple[int, ...]) -> RegionSet:
    """Read a part of a data set once for all its benchmarks. The stamp is that of the present annotations."""
    if not train:
        return DATA_SETS[name].load(data, train, regions.evenly)
    # The images to choose the penalty by are from the same sample.
    return DATA_SETS[name].load(
        data, train, lambda labels, classes: regions.balanced(labels, classes, PROBE_REGIONS // classes)
    )


class Goi(maps.OnMaps):
    """Items are images. Columns are, by class, the number of regions and the number named correctly."""

    family = "goi"
    annotations = "annotations"
    kind: str

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.names, self.classes = self.test.names, len(self.test.names)
        each = PROBE_REGIONS // self.classes
        most = {"test": None, "train": each, "validation": max(1, each // 4)}
        parts = {"test": self.test, **self.parts}
        self.taken = {part: found.of_kind(self.kind, most[part]) for part, found in parts.items()}
        for part, found in parts.items():
            if found.names != self.names:
                raise DataError(
                    f"{found.files[0]}: its categories are not those of {self.test.files[0]}; get both again"
                )
            if not any(self.taken[part]):
                raise DataError(
                    f"{found.files[0]}: the {len(found.images)} images taken as {part} have no {self.kind}; some are "
                    f"needed; is it {self.data_set}'s file?"
                )

    def read(self, *, train: bool) -> RegionSet:
        found = DATA_SETS[self.data_set]
        files = [self.context.data / path for path in (train and found.trains_on) or found.needs]
        stamp = tuple(value for file in files for value in (file.stat().st_size, file.stat().st_mtime_ns))
        return _read(self.data_set, self.context.data, train, stamp)

    def examples(self, tower: FeatureStore, images: Images, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return regions, because the logistic regression is on the region's mean feature."""
        _, labels, features = zip(*self.pooled(tower, images, part), strict=True)
        return torch.cat(features), torch.cat(labels)

    def pooled(
        self, tower: FeatureStore, images: Images, part: str
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield for each image with selected regions its number, and their labels `[M]` and mean features `[M, C]`."""
        shown = (self.parts.get(part) or self.test).images
        for start, cells in in_chunks(tower, images):
            for number, each in enumerate(cells, start):
                if taken := self.taken[part][number]:
                    weights = shown[number].coverage(taken, self.kind, tuple(each.shape[1:]))
                    labels = torch.tensor([region.label for region in taken])
                    yield number, labels, region_pooling.mean_features(each, weights)

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        readout = self.readout(tower, images)
        present = sorted({region.label for found in self.taken["test"] for region in found})
        column = {label: i for i, label in enumerate(present)}
        scores = np.zeros((len(self.test.images), len(present), 1 + len(region_pooling.AT)))
        for number, labels, features in self.pooled(tower, images["test"], "test"):
            right = region_pooling.within(readout(features), labels)
            rows = np.column_stack((np.ones(len(labels)), right.numpy()))
            np.add.at(scores, (number, [column[label] for label in labels.tolist()]), rows)
        return scores.reshape(len(scores), -1)

    def figure(self, means: np.ndarray) -> np.ndarray:
        return region_pooling.class_means(means)


METRIC = "class-mean top-1 and top-5 accuracy"
for _name, _found in DATA_SETS.items():
    for _kind in _found.kinds:
        _metrics = {"zero-shot": METRIC, "probe": f"{METRIC} of a linear probe"}
        maps.declare(Goi, f"{_name} {_kind}", _found, _metrics, data_set=_name, kind=_kind)
