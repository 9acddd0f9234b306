"""Annotations in the form that faster-coco-eval takes, for any ids and with optional fields filled in."""

from collections.abc import Sequence
from pathlib import Path

from visft.data.datasets.coco_json import in_order, read_json
from visft.data.masks import area, usable
from visft.errors import DataError


class GroundTruth:
    """A data set's annotations with numbers 1, 2, ... instead of its ids.

    faster-coco-eval keeps ids as int64 and takes an annotation of id 0 for an unmatched one. The numbers follow the
    order in which it and pycocotools sort ids, which decides between equal scores.

    Attributes:
        dataset: `images`, `annotations` and `categories` with these numbers. Every annotation has `iscrowd` and `area`
            (of its mask, or else of its box).
        images, categories: the number of each of the data set's ids.
        annotated: whether the file has annotations; test splits are published without.
        has_masks: whether each annotation has one.
    """

    def __init__(self, file: str | Path, content: dict):
        """
        Args:
            file: for messages.
            content: in COCO's or LVIS's format.

        Raises:
            DataError: two images or categories have one id, or an annotation is of an image or category that is not
                there.
            KeyError, TypeError, ValueError, AttributeError: the content is in neither format.
        """
        self.file = str(file)
        self.annotated = "annotations" in content
        self.images = self._numbers("image", in_order(image["id"] for image in content["images"]))
        self.categories = self._numbers("category", sorted(c["id"] for c in content["categories"]))
        sizes = {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}
        annotations = [
            self._annotation(number, annotation, sizes)
            for number, annotation in enumerate(content.get("annotations", ()), 1)
        ]
        self.has_masks = all("segmentation" in annotation for annotation in annotations)
        self.dataset = {
            "images": [self._image(image) for image in content["images"]],
            "categories": [{**c, "id": self.categories[c["id"]]} for c in content["categories"]],
            "annotations": annotations,
        }

    def results(self, results: Sequence[dict], task: str) -> list[dict]:
        """Copies of results with numbers for ids and only the field that the task needs.

        The library writes into results. Given a box and a mask, it would take an object's size from the box.

        Args:
            results: in COCO's results format, with the data set's ids.
            task: `bbox` or `segm`.

        Raises:
            DataError: a result is of an image or category that the data set does not have.
        """
        kept = {"bbox": "bbox", "segm": "segmentation"}[task]
        return [
            {
                "image_id": self._number("image", result["image_id"]),
                "category_id": self._number("category", result["category_id"]),
                "score": result["score"],
                kept: result[kept],
            }
            for result in results
        ]

    def _numbers(self, kind: str, ids: list) -> dict:
        numbers = {own: number for number, own in enumerate(ids, 1)}
        if len(numbers) != len(ids):
            raise DataError(f"{self.file}: an {kind} id occurs twice; ids must be unique")
        return numbers

    def _number(self, kind: str, own: object) -> int:
        numbers = self.images if kind == "image" else self.categories
        if own not in numbers:
            raise DataError(
                f"{self.file}: {kind} id {own!r} is not among its {len(numbers)}; annotations and predictions must be "
                "of this file's own"
            )
        return numbers[own]

    def _image(self, image: dict) -> dict:
        numbered = {**image, "id": self.images[image["id"]]}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):  # LVIS
            if key in image:
                numbered[key] = [self.categories[c] for c in image[key] if c in self.categories]
        return numbered

    def _annotation(self, number: int, annotation: dict, sizes: dict) -> dict:
        numbered = {
            **annotation,
            "id": number,
            "image_id": self._number("image", annotation["image_id"]),
            "category_id": self._number("category", annotation["category_id"]),
            "iscrowd": annotation.get("iscrowd") or 0,
        }
        numbered.pop("segmentation", None)
        mask = usable(annotation.get("segmentation"))
        if mask is not None:
            numbered["segmentation"] = mask
        if annotation.get("area") is None and mask is not None:
            numbered["area"] = area(mask, sizes[annotation["image_id"]])
        elif annotation.get("area") is None:
            _, _, width, height = annotation["bbox"]
            numbered["area"] = float(width * height)
        return numbered


def read_truth(file: str | Path, name: str) -> GroundTruth:
    """The annotations of a file.

    Args:
        name: of the format, for messages.

    Raises:
        DataError: the file is not there, or not readable as such.
    """
    if not Path(file).is_file():
        raise DataError(f"{file}: not found; the evaluation needs a data set's annotations there")
    content = read_json(str(file))
    try:
        return GroundTruth(file, content)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: no annotations in {name} format ({error!r}); correct or replace it"
        ) from error
