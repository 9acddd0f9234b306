"""Sets of labelled images on disk: ImageNet and its relatives, and clip-benchmark's webdatasets."""

import logging
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from towerbench.errors import DataError
from towerbench.features import FeatureStore
from towerbench.real import sources
from towerbench.real.sources import Source

logger = logging.getLogger(__name__)

IMAGENET_VARIANTS = {
    "imagenet": ("imagenet/val", "ImageNet's validation images, in 1000 folders n01440764, ...", 1000),
    "imagenet-v2": (
        "imagenetv2-matched-frequency-format-val",
        "ImageNet-v2, as its archive unpacks: folders 0 to 999",
        1000,
    ),
    "imagenet-a": ("imagenet-a", "ImageNet-A, as its archive unpacks: 200 folders", 200),
    "imagenet-r": ("imagenet-r", "ImageNet-R, as its archive unpacks: 200 folders", 200),
    "imagenet-sketch": (
        "imagenet-sketch|sketch",
        "ImageNet-Sketch, as its archive unpacks: 1000 folders",
        1000,
    ),
}
"""Folder below --data, what it is, and its number of classes."""

OBJECTNET = "objectnet-1.0"

VTAB = (
    "caltech101", "cifar100", "dtd", "flowers", "pets", "sun397", "svhn",
    "eurosat", "pcam", "resisc45", "diabetic_retinopathy",
    "clevr_closest_object_distance", "clevr_count_all", "dmlab", "dsprites_label_orientation",
    "dsprites_label_x_position", "kitti_closest_vehicle_distance",
    "smallnorb_label_azimuth", "smallnorb_label_elevation",
)  # fmt: skip
"""VTAB's 19 tasks (arXiv:1910.04867) by clip-benchmark's names."""


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images.

    Args:
        sources: one per image.
        labels: indices into `names`.
        names: of the classes, in words.
        templates: of prompts, with `{}` for the name.
        imagenet: for each class, the indices of ImageNet's classes that correspond to it. None: no relative of
            ImageNet.
        border: number of pixels to cut off each side of an image.
    """

    sources: Sequence[Source]
    labels: Sequence[int]
    names: Sequence[str]
    templates: Sequence[str]
    imagenet: Sequence[tuple[int, ...]] | None = None
    border: int = 0

    def classifier(self, tower: FeatureStore) -> torch.Tensor:
        """Return the zero-shot classifier `[classes, D]`."""
        return tower.class_embeddings(self.names, self.templates)

    def part(self, numbers: Sequence[int]) -> "LabelledSet":
        """Return some of its images."""
        return sources.rows_of(self, numbers, "sources", "labels")


def imagenet_templates() -> list[str]:
    """Return CLIP's 80 prompt templates."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    # The templates are functions of a name.
    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def imagenet_folders(folder: Path) -> dict[int, Path]:
    """Return folders of images by the index of their class. Folders are named by WordNet id, or by index if all names
    are numbers.

    Raises:
        DataError: there are no folders, or one has another name.
    """
    from timm.data import ImageNetInfo

    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(
            f"{folder}: holds no folders; one a class was expected, named as n01440764 or as 0 to 999"
        )
    place = {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if all(path.name.isdigit() for path in found):
        place = {str(i): i for i in range(1000)}
    for path in found:
        if path.name not in place:
            raise DataError(
                f"{path}: is named by no class of ImageNet; WordNet ids as n01440764, or numbers from 0 to 999, "
                "were expected; take it out of there"
            )
    return {place[path.name]: path for path in found}


def imagenet_like(folder: Path, classes: int) -> LabelledSet:
    """Return ImageNet, or a relative whose folders are named like ImageNet's. The classes are those that it has."""
    from open_clip import IMAGENET_CLASSNAMES

    folders = imagenet_folders(folder)
    if len(folders) != classes:
        logger.warning("%s: folders of %d classes, where the whole set has %d", folder, len(folders), classes)
    order = sorted(folders)
    rows = [
        (Source(file), label) for label, index in enumerate(order) for file in sources.listed(folders[index])
    ]
    if not rows:
        raise DataError(f"{folder}: its folders hold no images; unpack the data set's archive there")
    return LabelledSet(
        *zip(*rows, strict=True),
        names=[IMAGENET_CLASSNAMES[index] for index in order],
        templates=imagenet_templates(),
        imagenet=[(index,) for index in order],
    )


def objectnet(folder: Path) -> LabelledSet:
    """Return ObjectNet's images of the classes that ImageNet also has. Only these classes are told apart.

    Args:
        folder: of the unpacked archive, with `images` and `mappings`.
    """
    mappings = folder / "mappings"
    label_of = sources.read_json(mappings / "folder_to_objectnet_label.json")
    shared = sources.read_json(mappings / "objectnet_to_imagenet_1k.json")
    number_of = {
        line: int(key)
        for key, line in sources.read_json(mappings / "pytorch_to_imagenet_2012_id.json").items()
    }
    lines = sources.read_text(
        mappings / "imagenet_to_label_2012_v2", "unpack ObjectNet's archive again"
    ).splitlines()
    index_of = {line.strip(): number_of[i] for i, line in enumerate(lines) if i in number_of}
    names, imagenet, rows = [], [], []
    for name, label in sorted(label_of.items()):
        if label not in shared:
            continue
        meant = shared[label].split("; ")
        unknown = [words for words in meant if words not in index_of]
        if unknown:
            raise DataError(
                f"{mappings / 'objectnet_to_imagenet_1k.json'}: `{unknown[0]}` is no class of ImageNet"
            )
        if (folder / "images" / name).is_dir():
            rows += [(Source(file), len(names)) for file in sources.listed(folder / "images" / name)]
        names.append(label.lower())
        imagenet.append(tuple(index_of[words] for words in meant))
    if not rows:
        raise DataError(
            f"{folder / 'images'}: holds no images of classes that ImageNet has; unpack ObjectNet there"
        )
    # The images have a red border of one pixel. Two pixels are cut off.
    return LabelledSet(*zip(*rows, strict=True), names, imagenet_templates(), imagenet, border=2)


def webdataset_paths(name: str, split: str) -> str:
    """Return the places of a split in clip-benchmark's format below --data: cloned, or exported."""
    plain = ("wds_sun397", "wds-sun397") if name == "sun397" else ()
    return "|".join(
        f"{folder}/{split}" for folder in (*plain, f"wds_vtab-{name}", f"wds-vtab-{name}", f"vtab/{name}")
    )


def webdataset(folder: Path) -> LabelledSet:
    """Read a split from `clip_benchmark_export_wds`: `0.tar`, ..., and beside the folder `classnames.txt` and templates
    with `{c}`."""
    names = _lines(folder.parent / "classnames.txt")
    templates = _lines(folder.parent / "zeroshot_classification_templates.txt")
    shards = sorted(folder.glob("*.tar"), key=lambda file: (len(file.stem), file.stem))
    if not shards:
        raise DataError(f"{folder}: holds no .tar; 0.tar, 1.tar, ... were expected; download the split again")
    _check_count(folder, len(shards))
    found, labels = [], []
    for shard in shards:
        parts: dict[str, Source] = {}
        classes: dict[str, int] = {}
        with sources.readable(shard, "tar of images and `.cls`"), tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                if suffix == "cls":
                    classes[key] = int(archive.extractfile(member).read())
                elif f".{suffix.lower()}" in sources.IMAGE_SUFFIXES:
                    parts[key] = Source(shard, member.offset_data, member.size)
        for key in parts:
            if not 0 <= classes.get(key, -1) < len(names):
                raise DataError(
                    f"{shard}: `{key}` has the class {classes.get(key)}, and classnames.txt has {len(names)} lines; a "
                    "number below was expected in its `.cls`"
                )
            found.append(parts[key])
            labels.append(classes[key])
    return LabelledSet(found, labels, names, [line.replace("{c}", "{}") for line in templates])


def _check_count(folder: Path, found: int) -> None:
    """Compare the number of tar files with nshards.txt, because a download may have stopped early."""
    file = folder / "nshards.txt"
    said = re.fullmatch(r"\s*(\d+)\s*", sources.read_text(file)) if file.is_file() else None
    if said is None or int(said[1]) != found:
        raise DataError(
            f"{file}: says {said[1] if said else 'no number'}, and there are {found} files .tar; get the split again"
        )


def _lines(file: Path) -> list[str]:
    text = sources.read_text(file, "clip-benchmark's export writes it; get it again")
    return [line.strip() for line in text.splitlines() if line.strip()]
