"""The in-domain evaluator, which scores every head's output under its name."""

import functools
import itertools
import logging
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import create_small_table

from visft.checkpoint import files
from visft.classes.dataset_classes import places_by_name
from visft.errors import DataError
from visft.evaluation.average_precision import COCOMetric
from visft.evaluation.caption_metrics import CaptionEvaluator
from visft.evaluation.gathering import gathered
from visft.evaluation.lvis import LVISMetric
from visft.evaluation.region_naming import RegionTextEvaluator

logger = logging.getLogger(__name__)


class HeadsEvaluator(DatasetEvaluator):
    """Average precision of each head of a ViSFT model: LVIS's on data sets of the kind `lvis`, else COCO's.

    `evaluate` returns `{"detection/bbox": {"AP": ..., "AP50": ...}, "segmentation/bbox": ..., ...}`; detectron2's
    flattening turns it into `detection/bbox/AP50`. Masks are scored where a head predicts some. The figures are those
    of detectron2's COCOEvaluator and LVISEvaluator, except that a head that finds nothing scores 0, not nan. Caption
    heads are skipped.
    """

    def __init__(
        self,
        dataset_name: str,
        heads: Sequence[str],
        *,
        class_names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            dataset_name: registered; its metadata's `json_file` holds the annotations. A data set without such a file
                is converted to COCO's format.
            heads: names of the heads to score, whose outputs are Instances.
            class_names: names of the predicted classes in the order of their numbers. They are matched by name with the
                data set's classes; predictions of other classes are left out. (): numbered as in the data set.

        Raises:
            DataError: the annotations are not readable.
        """
        self.heads, self.class_names = tuple(heads), tuple(class_names)
        self.metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.metric = self._load()
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._results: dict[str, list[dict]] = {name: [] for name in self.heads}
        self._tasks: dict[str, set[str]] = {name: set() for name in self.heads}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the predictions that can count, masks run-length encoded.

        Args:
            inputs: with `image_id`.
            outputs: the model's, in coordinates of the original images.

        Raises:
            DataError: the data set does not have a prediction's class.
        """
        for image, output in zip(inputs, outputs, strict=True):
            for name in self.heads:
                instances = output.get(name)
                if not isinstance(instances, Instances):
                    continue
                self._tasks[name] |= {"bbox", "segm"} if instances.has("pred_masks") else {"bbox"}
                self._results[name] += self._encode(instances, image["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Figures in per cent by head and kind. Empty except on the main process."""
        parts = gathered((self._results, self._tasks))
        if parts is None:
            return {}
        predicted = {name: list(itertools.chain(*(part[name] for part, _ in parts))) for name in self.heads}
        self._keep(predicted)
        if not self.metric.annotated:
            logger.warning("%s has no annotations: nothing is evaluated", self.dataset_name)
            return {}
        figures: dict[str, dict[str, float]] = OrderedDict()
        for name in self.heads:
            results = predicted[name]
            tasks = sorted(set().union(*(kinds[name] for _, kinds in parts)))
            if "segm" in tasks and not self.metric.truth.has_masks:
                tasks.remove("segm")
                logger.warning(
                    "%s has annotations without masks: those of head `%s` are not scored",
                    self.dataset_name,
                    name,
                )
            if tasks and not results:
                logger.warning("head `%s` predicted nothing on %s", name, self.dataset_name)
            for task in tasks:
                scores = self.metric(results, task, self._class_names())
                figures[f"{name}/{task}"] = scores
                main = {metric: scores[metric] for metric in self.metric.names}
                logger.info(
                    "%s, %s of head `%s`:\n%s", self.dataset_name, task, name, create_small_table(main)
                )
        return figures

    def _keep(self, results: dict[str, list[dict]]) -> None:
        """Write the results by head, in subclasses that do."""

    @property
    def _is_lvis(self) -> bool:
        return self.metadata.get("evaluator_type") == "lvis"

    def _load(self) -> COCOMetric:
        if hasattr(self.metadata, "json_file"):
            return (LVISMetric if self._is_lvis else COCOMetric)(self.metadata.json_file)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "annotations.json"
            convert_to_coco_json(self.dataset_name, str(file), allow_cached=False)
            return COCOMetric(file)

    @functools.cached_property
    def _ids(self) -> dict[int, int]:
        """The data set's category id of each predicted class. Loading the data set has filled the metadata."""
        names = self.metadata.get("thing_classes")
        if not self.class_names or not names:
            return self._own_ids
        places = places_by_name(self.class_names, self.dataset_name, names)
        return {predicted: self._own_ids[own] for predicted, own in places.items()}

    @functools.cached_property
    def _own_ids(self) -> dict[int, int]:
        """The data set's category id of each of its contiguous classes."""
        mapping = self.metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping:
            return {contiguous: dataset for dataset, contiguous in mapping.items()}
        # LVIS counts its classes from 1.
        first = 1 if self._is_lvis else 0
        return {index: index + first for index in range(len(self.metadata.get("thing_classes", ())))}

    def _class_names(self) -> list[str]:
        """Names of the classes in the order of their category ids, as in COCO's figures. Equal names get the ids."""
        names, ids = self.metadata.get("thing_classes", ()), self._own_ids
        if set(ids.values()) != set(self.metric.truth.categories):
            return []
        count = Counter(names)
        return [
            names[c] if count[names[c]] == 1 else f"{names[c]} ({ids[c]})"
            for c in sorted(ids, key=ids.get)
            if c < len(names)
        ]

    def _encode(self, instances: Instances, image_id: int | str) -> list[dict]:
        """Results in COCO's format, with the data set's category ids."""
        classes = instances.pred_classes.tolist()
        strange = set(classes) - self._ids.keys() - set(range(len(self.class_names)))
        if strange:
            raise DataError(
                f"{self.dataset_name} has {len(self._ids)} classes, a prediction has class {max(strange)}: evaluate on "
                "a data set with the classes of DATASETS.TRAIN"
            )
        if not self._ids.keys() >= set(classes):
            instances = instances[torch.tensor([number in self._ids for number in classes])]
            classes = instances.pred_classes.tolist()
        categories = [self._ids[c] for c in classes]
        counting = self.metric.counting(image_id, instances.scores.tolist(), categories)
        if len(counting) < len(instances):  # before masks leave the device
            rows = torch.tensor(counting, dtype=torch.int64, device=instances.pred_classes.device)
            instances = instances[rows]
        found = instances_to_coco_json(instances.to(torch.device("cpu")), image_id)
        return [r | {"category_id": categories[i]} for r, i in zip(found, counting, strict=True)]


class InstancesEvaluator(HeadsEvaluator):
    """The same figures for a stock detector, whose one output is `instances`, by detectron2's names: `bbox/AP`."""

    def __init__(self, dataset_name: str, *, results_file: str | None = None) -> None:
        """
        Args:
            results_file: where the predictions that count are written, in COCO's results format.
        """
        super().__init__(dataset_name, ("instances",))
        self._results_file = results_file

    def _keep(self, results: dict[str, list[dict]]) -> None:
        if self._results_file:
            os.makedirs(os.path.dirname(self._results_file), exist_ok=True)
            files.write_json(self._results_file, results["instances"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {task.removeprefix("instances/"): figures for task, figures in super().evaluate().items()}


def build_evaluator(cfg: CfgNode, dataset_name: str, class_names: Sequence[str] = ()) -> DatasetEvaluator:
    """The evaluator of a ViSFT model's heads on a data set of DATASETS.TEST.

    Heads with a vocabulary are caption heads. Heads whose HEAD is RegionTextHead name regions. The others find
    instances.

    Args:
        class_names: of the model (see `HeadsEvaluator`).

    Raises:
        DataError: the data set's annotations are not readable.
    """
    heads = cfg.MODEL.VISFT.HEADS
    captions = [name for name in heads if "VOCABULARY" in cfg.MODEL.VISFT[name.upper()]]
    namers = [name for name in heads if cfg.MODEL.VISFT[name.upper()].HEAD == "RegionTextHead"]
    others = [name for name in heads if name not in (*captions, *namers)]
    evaluators: list[DatasetEvaluator] = []
    if others:
        evaluators.append(HeadsEvaluator(dataset_name, others, class_names=class_names))
    if captions:
        evaluators.append(CaptionEvaluator(dataset_name, captions, metrics=cfg.VISFT.CAPTION_METRICS))
    if namers:
        evaluators.append(RegionTextEvaluator(dataset_name, namers))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
