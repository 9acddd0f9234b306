"""RegionTextHead in domain: how well the text encoder names the annotated regions of a data set."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils.logger import create_small_table
from PIL import Image
from torch import Tensor

from visft.classes.class_names import stuff_words, synonyms
from visft.data.datasets.coco import records_of
from visft.data.datasets.coco_json import read_json
from visft.data.masks import decode as annotated_mask
from visft.data.masks import usable
from visft.errors import DataError
from visft.evaluation.gathering import gathered
from visft.modeling.backbone.class_embeddings import ClassText
from visft.modeling.heads import RegionText, RegionTextHead

logger = logging.getLogger(__name__)


class RegionTextEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy of naming annotated regions among the names of their data set. Crowds are left out.

    `evaluate` returns `{"region_text/mask": {"top1": ..., "top5": ..., "class_mean": ...}, "region_text/box": ...,
    "region_text/stuff": ...}`: things by mask and by box, stuff by mask. `class_mean` is the mean over names of each
    occurring name's top-1. Classes whose names are equal to the tokenizer count as one name.

    Things are named among things, and stuff among stuff. A head that learns from things moves regions towards the names
    of things; a figure over both would measure that, not whether stuff is told apart.
    """

    def __init__(self, dataset_name: str, heads: Sequence[str]) -> None:
        """
        Args:
            dataset_name: registered; its records are matched with the model's inputs by `image_id`. Stuff is read from
                its metadata's `panoptic_json` and `panoptic_root`, or from `panoptic_X.json` and the folder
                `panoptic_X` near an `instances_X.json`; without them it is not evaluated.
            heads: names of RegionTextHeads in the model's outputs.

        Raises:
            DataError: the data set has no class names, or its panoptic file is broken.
        """
        self.dataset_name, self.heads = dataset_name, tuple(heads)
        self._records = {record["image_id"]: record for record in records_of(dataset_name)}
        metadata = MetadataCatalog.get(dataset_name)
        self._things = synonyms(metadata)
        if not self._things:
            raise DataError(
                f"{dataset_name} has no thing_classes in its metadata, by which {', '.join(self.heads)} could name its "
                "regions: fill them when registering the data set"
            )
        self._stuff = find_stuff(metadata)
        self._texts: dict[tuple[str, str], ClassText] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._counts: dict[str, Tensor] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Name the annotated regions of some images, and count.

        Args:
            inputs: with `image_id`.
            outputs: the model's, with a RegionText under each head's name.

        Raises:
            DataError: an image is not among the records, or an image of segments cannot be read.
        """
        for image, output in zip(inputs, outputs, strict=True):
            record = self._records.get(image["image_id"])
            if record is None:
                raise DataError(
                    f"{self.dataset_name} has no image_id {image['image_id']}: evaluate on the images of this data set"
                )
            annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            for name in self.heads:
                self._name(name, output[name], annotations, image["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Figures in per cent by head and kind of region. Empty except on the main process."""
        found = gathered(self._counts)
        if found is None:
            return {}
        figures = {}
        for name in self.heads:
            for kind in ("mask", "box", "stuff"):
                key = f"{name}/{kind}"
                parts = [counts[key] for counts in found if key in counts]
                if not parts:
                    continue
                figures[key] = _accuracies(torch.stack(parts).sum(0))
                logger.info("%s, %s:\n%s", self.dataset_name, key, create_small_table(figures[key]))
        if not figures:
            logger.warning("%s has no annotated regions: nothing is evaluated", self.dataset_name)
        return figures

    def _name(self, name: str, output: RegionText, annotations: list[dict], image_id: int | str) -> None:
        boxed = [a for a in annotations if "bbox" in a]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in boxed]
        self._count(name, "box", output, torch.tensor(boxes).view(-1, 4), [a["category_id"] for a in boxed])
        drawn = [a for a in annotations if usable(a.get("segmentation")) is not None]
        masks = [annotated_mask(a["segmentation"], output.size) for a in drawn]
        self._count(name, "mask", output, _stack(masks, output.size), [a["category_id"] for a in drawn])
        if self._stuff is not None:
            masks, classes = self._stuff.regions(image_id, output.size)
            self._count(name, "stuff", output, _stack(masks, output.size), classes)

    def _count(self, name: str, kind: str, output: RegionText, regions: Tensor, classes: list[int]) -> None:
        if not classes:
            return
        text = self._text(name, output.head, kind == "stuff")
        target = text.rows[torch.tensor(classes)]
        best = output.logits(regions, text.embeddings).topk(min(5, len(text.names)), dim=1).indices.cpu()
        hits = best == target[:, None]
        found = torch.stack([torch.ones(len(target)), hits[:, 0], hits.any(1)]).double()
        counts = self._counts.setdefault(
            f"{name}/{kind}", torch.zeros(3, len(text.names), dtype=torch.float64)
        )
        counts.index_add_(1, target, found)

    def _text(self, name: str, head: RegionTextHead, stuff: bool) -> ClassText:
        """Classifiers of the data set's names, computed once. A head that knows the same names has them already."""
        names = self._stuff.names if stuff else self._things
        key = (name, "stuff" if stuff else "things")
        if key not in self._texts:
            if list(names) == list(head.class_names):
                self._texts[key] = ClassText(head.embeddings.cpu(), head.rows.cpu(), head.names)
            else:
                self._texts[key] = head.class_text(names)
        return self._texts[key]


def _accuracies(counts: Tensor) -> dict[str, float]:
    """Figures in per cent from `[3, names]`: number of regions, hits of the first guess, hits of the first five."""
    total, first, five = counts.sum(1).tolist()
    occurs = counts[0] > 0
    mean = (counts[1, occurs] / counts[0, occurs]).mean()
    return {"top1": 100 * first / total, "top5": 100 * five / total, "class_mean": 100 * float(mean)}


def _stack(masks: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """`[R, H, W]` bool."""
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.bool)


@dataclass(frozen=True)
class StuffSegments:
    """The stuff of a panoptic data set."""

    json_file: Path
    folder: Path

    @functools.cached_property
    def _content(self) -> dict:
        content = read_json(str(self.json_file), "`annotations` and `categories`")
        try:
            return {
                "stuff": [c for c in content["categories"] if not c["isthing"]],
                "segments": {
                    a["image_id"]: (a["file_name"], a["segments_info"]) for a in content["annotations"]
                },
            }
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.json_file}: no readable panoptic annotations ({error!r}); expected COCO's panoptic format, "
                "with `categories` (each with `isthing`) and `annotations` (each with `file_name` and `segments_info`)"
            ) from error

    @property
    def names(self) -> list[tuple[str, ...]]:
        """What each stuff class is called, in the file's order."""
        return [stuff_words(category["name"]) for category in self._content["stuff"]]

    @functools.cached_property
    def _classes(self) -> dict[int, int]:
        return {category["id"]: index for index, category in enumerate(self._content["stuff"])}

    def regions(self, image_id: int | str, size: tuple[int, int]) -> tuple[list[np.ndarray], list[int]]:
        """Masks `[H, W]` bool of an image's stuff, crowds and segments without a pixel left out, and their classes.

        Args:
            image_id: an image that the file does not have gives none.
            size: (height, width) of the image.

        Raises:
            DataError: the image of segments cannot be read, or has another size.
        """
        if image_id not in self._content["segments"]:
            return [], []
        name, segments = self._content["segments"][image_id]
        try:
            with Image.open(self.folder / name) as image:
                colours = np.asarray(image.convert("RGB"), dtype=np.int64)
        except OSError as error:
            raise DataError(
                f"{self.folder / name}: is no readable image of segments ({error}); {self.json_file} names it"
            ) from error
        if colours.shape[:2] != tuple(size):
            raise DataError(
                f"{self.folder / name}: is {colours.shape[1]} x {colours.shape[0]}, its image {size[1]} x {size[0]}; "
                "the image of segments must have the image's size"
            )
        ids = colours @ np.array([1, 256, 256**2])
        masks, classes = [], []
        for segment in segments:
            if segment["category_id"] in self._classes and not segment.get("iscrowd", 0):
                mask = ids == segment["id"]
                if mask.any():
                    masks.append(mask)
                    classes.append(self._classes[segment["category_id"]])
        return masks, classes


def find_stuff(metadata: Metadata) -> StuffSegments | None:
    """The stuff of a data set with panoptic files, or None.

    COCO's archive has the folder beside the JSON file, detectron2 expects it one folder up. Both places are searched.
    """
    found = [(metadata.get("panoptic_json"), metadata.get("panoptic_root"))]
    instances = Path(metadata.get("json_file") or "")
    if instances.name.startswith("instances_"):
        json_file = instances.with_name(instances.name.replace("instances_", "panoptic_", 1))
        found += [(json_file, place / json_file.stem) for place in json_file.parents[:2]]
    for json_file, folder in found:
        if json_file and folder and Path(json_file).is_file() and Path(folder).is_dir():
            stuff = StuffSegments(Path(json_file), Path(folder))
            return stuff if stuff.names else None
    return None
