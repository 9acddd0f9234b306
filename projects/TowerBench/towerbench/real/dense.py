"""Semantic segmentation of real images from each cell of the map, by a linear probe and by the classes' names."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from towerbench import region_pooling, segmentation
from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.real import maps, sources
from towerbench.real.sources import Source
from towerbench.registry import Context

CELLS = 12
"""Number of cells of an image that a probe trains on: one of each class in it, then any others."""

SIDE = 256
"""An image is compared at no more than SIDE x SIDE evenly spread pixels. Each counts for all pixels that it represents,
so that larger images count for more, as usual in mIoU."""

IGNORED, BROKEN = 255, 254

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip

CONTEXT = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle", "building", "bus",
    "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain", "dog", "door", "fence",
    "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse",
    "person", "plate", "platform", "potted plant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky",
    "snow", "sofa", "table", "track", "train", "tree", "truck", "tv monitor", "wall", "water", "window", "wood",
)  # fmt: skip
"""The order is that of their ids among the 459 classes, which is alphabetical. mmsegmentation's conversion numbers them
in this order, from 1."""


@dataclass(frozen=True)
class Labelled:
    """Images with label maps.

    Args:
        files: the maps, one per image.
        table: from the values in them to classes, `IGNORED` or `BROKEN`, `[256]` uint8.
    """

    sources: Sequence[Source]
    files: Sequence[Path]
    table: np.ndarray

    def labels(self, number: int) -> np.ndarray:
        """Return an image's classes `[H, W]`, or `IGNORED`.

        Raises:
            DataError: the map is missing or broken, or has another label.
        """
        file = self.files[number]
        with sources.readable(file, "label map", "get the data set again"):
            values = np.asarray(Image.open(file))  # keeps the indices of a palette
        if values.ndim != 2 or values.dtype != np.uint8:
            raise DataError(
                f"{file}: has shape {values.shape} of {values.dtype}; one 8-bit label a pixel was expected (not the "
                "colours that it is shown in)"
            )
        found = self.table[values]
        if (found == BROKEN).any():
            known = np.flatnonzero(self.table != BROKEN)
            whole = known[known < IGNORED]
            raise DataError(
                f"{file}: has the label {values[found == BROKEN][0]}; {whole[0]} to {whole[-1]}"
                f"{' and 255' if known[-1] == IGNORED else ''} were expected; is it of this data set, and converted "
                "as its annotations are used for segmentation?"
            )
        return found

    def check(self) -> None:
        """Read everything once, so that no broken file is found in the middle of a long run.

        Raises:
            DataError: a map or an image is missing or broken, or they differ in size.
        """
        for number, source in enumerate(self.sources):
            size = self.labels(number).shape
            with sources.readable(source.file, "image"), Image.open(source.file) as image:
                shown = image.height, image.width
            if shown != size:
                raise DataError(
                    f"{self.files[number]}: is of height and width {size}, and its image of {shown}; both of one "
                    "size were expected; get the data set again"
                )

    def part(self, numbers: Sequence[int]) -> "Labelled":
        """Return some of its images."""
        return sources.rows_of(self, numbers, "sources", "files")


@dataclass(frozen=True, kw_only=True)
class DataSet(maps.DataSet):
    """Where images and label maps come from.

    Args:
        listed: from `--data` and whether it is for training to the images and maps, in order.
        names: returns the words for each class.
        first: the value of the first class in maps. Smaller values have no class.
        void: whether 255 stands for no class.
        background: whether the smaller values are one more class for the probe. It has no name to compare with.
    """

    listed: Callable[[Path, bool], list[tuple[Path, Path]]]
    names: Callable[[], list[tuple[str, ...]]]
    first: int = 1
    void: bool = False
    background: bool = False


def _ade20k_files(data: Path, train: bool) -> list[tuple[Path, Path]]:
    folder, split = data / "ADEChallengeData2016", "training" if train else "validation"
    found = sources.listed(folder / "images" / split)
    if not found:
        raise DataError(
            f"{folder / 'images' / split}: holds no images; unpack ADEChallengeData2016.zip there"
        )
    return [(file, folder / "annotations" / split / f"{file.stem}.png") for file in found]


def _ade20k_names() -> list[tuple[str, ...]]:
    names = Path(__file__).with_name("ade20k.txt").read_text(encoding="utf-8")
    return [maps.words(name) for name in names.splitlines()]


def _listed(folder: str, lists: str, labels: str, data: Path, train: bool) -> list[tuple[Path, Path]]:
    """Return the rows of the VOC devkit, whose names are in a list."""
    file = data / folder / "ImageSets" / lists / f"{'train' if train else 'val'}.txt"
    names = sources.read_text(
        file, "one name of an image a line was expected; get the data set again"
    ).split()
    if not names:
        raise DataError(f"{file}: names no images; one a line was expected; get the data set again")
    root = data / folder
    return [(root / "JPEGImages" / f"{name}.jpg", root / labels / f"{name}.png") for name in names]


DATA_SETS = {
    "ade20k": DataSet(
        needs={
            "ADEChallengeData2016/images/validation": "ADE20K's validation images, as the archive unpacks",
            "ADEChallengeData2016/annotations/validation": "their label maps, of the same archive",
        },
        trains_on={
            "ADEChallengeData2016/images/training": "ADE20K's training images",
            "ADEChallengeData2016/annotations/training": "their label maps",
        },
        listed=_ade20k_files,
        names=_ade20k_names,
        item_set="ade20k validation",
    ),
    "voc2012": DataSet(
        needs={"VOCdevkit/VOC2012": "Pascal VOC 2012, as VOCtrainval_11-May-2012.tar unpacks"},
        trains_on={},
        listed=functools.partial(_listed, "VOCdevkit/VOC2012", "Segmentation", "SegmentationClass"),
        names=lambda: [(name,) for name in VOC],
        void=True,
        background=True,
        item_set="voc2012 val",
    ),
    "pascal-context": DataSet(
        needs={
            "VOCdevkit/VOC2010/JPEGImages": "Pascal VOC 2010's images, as VOCtrainval_03-May-2010.tar unpacks",
            "VOCdevkit/VOC2010/SegmentationClassContext": "mmsegmentation's pascal_context.py writes it",
            "VOCdevkit/VOC2010/ImageSets/SegmentationContext": "the same script's train.txt and val.txt",
        },
        trains_on={},
        listed=functools.partial(
            _listed, "VOCdevkit/VOC2010", "SegmentationContext", "SegmentationClassContext"
        ),
        names=lambda: [(name,) for name in CONTEXT],
        item_set="pascal-context val",
    ),
}


class Dense(maps.OnMaps):
    """Items are images. Columns are intersections and unions by class."""

    family = "dense"
    annotations = "label maps"

    def __init__(self, context: Context) -> None:
        self.found = DATA_SETS[self.data_set]
        self.names = self.found.names()
        self.background = self.probe and self.found.background
        self.classes = len(self.names) + self.background
        super().__init__(context)

    def read(self, *, train: bool) -> Labelled:
        rows = self.found.listed(self.context.data, train)
        rows = [rows[i] for i in sources.spread(len(rows), maps.TRAIN if train else maps.TEST)]
        labelled = Labelled([Source(image) for image, _ in rows], [file for _, file in rows], self.table())
        labelled.check()
        return labelled

    def table(self) -> np.ndarray:
        """Return the table of `Labelled`. The background is the last class."""
        first, classes = self.found.first, len(self.names)
        table = np.full(256, BROKEN, np.uint8)
        table[:first] = classes if self.background else IGNORED
        table[first : first + classes] = np.arange(classes)
        if self.found.void:
            table[255] = IGNORED
        return table

    def examples(self, tower: FeatureStore, images: Images, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cells, because the logistic regression is on each cell."""
        found = self.parts[part]

        def labels(number: int, grid: tuple[int, int]) -> torch.Tensor:
            return cell_labels(compared(found.labels(number))[0].numpy(), grid)

        return segmentation.training_cells(tower, images, labels, chosen)

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        readout = self.readout(tower, images)
        return segmentation.segmented(
            tower,
            images["test"],
            lambda cells: class_by_class(readout(cells)),
            lambda number: compared(self.test.labels(number)),
            self.classes,
        )

    def figure(self, means: np.ndarray) -> np.ndarray:
        return segmentation.mean_iou(means)


def class_by_class(scores: torch.Tensor) -> torch.Tensor:
    """Lay out scores `[N, h, w, classes]` class by class in memory. Interpolation is then five times as fast."""
    return scores.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def compared(labels: np.ndarray) -> tuple[torch.Tensor, float]:
    """Return the pixels of a label map that are compared, `[h, w]`, and the number of pixels that each represents (see
    `SIDE`)."""
    height, width = (min(side, SIDE) for side in labels.shape)
    return segmentation.sampled(labels, height, width), labels.size / (height * width)


def cell_labels(labels: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Return what covers most of each cell `[h, w]`: a class, or `IGNORED`."""
    present = np.unique(labels)
    shares = torch.stack([region_pooling.coverage(labels == label, grid) for label in present])
    return torch.from_numpy(present.astype(np.int64))[shares.argmax(0)]


def chosen(number: int, labels: torch.Tensor) -> np.ndarray:
    """Return the cells of an image that a probe trains on. All towers get the same ones."""
    places = np.random.default_rng([13, number]).permutation(np.flatnonzero(labels.numpy() != IGNORED))
    _, first = np.unique(labels.numpy()[places], return_index=True)
    first = np.sort(first)  # random order, not that of the classes
    return np.concatenate((places[first], np.delete(places, first)))[:CELLS]


METRICS = {"text": "mIoU of patches against names", "probe": "mIoU of a linear probe"}
for _name, _found in DATA_SETS.items():
    maps.declare(Dense, _name, _found, METRICS, data_set=_name)
