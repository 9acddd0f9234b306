"""Captions scored as COCO scores them: BLEU, ROUGE-L and CIDEr-D by pycocoevalcap's scorers, which need no Java.

`ptb_words` splits captions into words, so figures do not depend on whether Java is installed. METEOR and SPICE are Java
programs in pycocoevalcap. They run on request; SPICE also needs Stanford CoreNLP.
"""

import contextlib
import io
import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.logger import create_small_table

from towerbench.caption_tokens import ptb_words
from visft.data.datasets.captions import captions_of
from visft.errors import ConfigError
from visft.evaluation.gathering import gathered

logger = logging.getLogger(__name__)

METRICS = ("BLEU", "ROUGE_L", "CIDEr")
"""Computed by default."""

_SCORERS = {
    "BLEU": ("bleu.bleu", "Bleu"),
    "ROUGE_L": ("rouge.rouge", "Rouge"),
    "CIDEr": ("cider.cider", "Cider"),
    "METEOR": ("meteor.meteor", "Meteor"),
    "SPICE": ("spice.spice", "Spice"),
}
"""Module and class of each in pycocoevalcap."""

KNOWN = tuple(_SCORERS)
"""Values of VISFT.CAPTION_METRICS."""

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""Files that SPICE reads in `pycocoevalcap/spice/lib`. pycocoevalcap would download them by HTTP, unchecked."""


def installed() -> bool:
    """Whether the scorers are installed (`pip install pycocoevalcap`)."""
    return find_spec("pycocoevalcap") is not None


def check_metrics(metrics: Sequence[str]) -> None:
    """Check VISFT.CAPTION_METRICS.

    Raises:
        ConfigError: a metric is unknown, or METEOR or SPICE is asked for where there is no Java, or SPICE without
            Stanford CoreNLP.
    """
    for name in metrics:
        if name not in KNOWN:
            raise ConfigError(f"VISFT.CAPTION_METRICS names `{name}`; expected some of {', '.join(KNOWN)}")
    for name in ("METEOR", "SPICE"):
        if name in metrics and shutil.which("java") is None:
            raise ConfigError(
                f"VISFT.CAPTION_METRICS names {name}, a Java program, and no `java` is found here: install a Java "
                f"runtime, or leave {name} out"
            )
    if "SPICE" in metrics and installed():
        folder = Path(find_spec("pycocoevalcap").submodule_search_locations[0]) / "spice" / "lib"
        for name in CORENLP:
            if not (folder / name).is_file():
                raise ConfigError(
                    f"VISFT.CAPTION_METRICS names SPICE, and {folder / name} is not there: put the two jars "
                    f"{' and '.join(CORENLP)} of Stanford CoreNLP (stanford-corenlp-full-2015-12-09.zip, from "
                    "nlp.stanford.edu/software) into that folder, or leave SPICE out"
                )


def caption_scores(
    references: Mapping, candidates: Mapping, metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Figures times 100, BLEU as `BLEU1` to `BLEU4`.

    CIDEr weighs words by how rare they are in these references, so it is 0 for a single image.

    Args:
        references: the captions of each image, a list of texts by image id.
        candidates: the captions to score, one text by image id, for the same images.
        metrics: of `KNOWN`.
    """
    truth, said = _words(references, candidates)
    scores: dict[str, float] = {}
    for name in metrics:
        module, scorer = _SCORERS[name]
        scorer = getattr(import_module(f"pycocoevalcap.{module}"), scorer)()
        with contextlib.redirect_stdout(io.StringIO()):
            value, _ = scorer.compute_score(truth, said)
        # BLEU has a figure for each length of word sequences, 1 to 4.
        figures = {f"BLEU{n}": part for n, part in enumerate(value, 1)} if name == "BLEU" else {name: value}
        scores |= {figure: 100 * float(part) for figure, part in figures.items()}
    return scores


def _words(references: Mapping, candidates: Mapping) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """What scorers compare, with ids 1, 2, ...: SPICE sorts ids and sends them through JSON."""
    truth = {n: [ptb_words(text) for text in texts] for n, texts in enumerate(references.values(), 1)}
    return truth, {n: [ptb_words(candidates[key])] for n, key in enumerate(references, 1)}


class CaptionEvaluator(DatasetEvaluator):
    """Scores each caption head on the images of a data set that have captions.

    `evaluate` returns `{"captioning": {"CIDEr": ..., "BLEU4": ..., ...}}`, as `caption_scores`.
    """

    def __init__(
        self,
        dataset_name: str,
        heads: Sequence[str],
        *,
        metrics: Sequence[str] = METRICS,
    ) -> None:
        """
        Args:
            dataset_name: registered.
            heads: names of the caption heads.
            metrics: of `KNOWN`.

        Raises:
            DataError: its caption file is broken.
        """
        self.dataset_name, self.heads = dataset_name, tuple(heads)
        self.metrics = tuple(metrics)
        found = captions_of(dataset_name).items()
        self.references = {
            key: kept for key, texts in found if (kept := [text for text in texts if ptb_words(text)])
        }
        self.reset()

    def reset(self) -> None:
        """Forget all captions."""
        self._said: dict[str, dict] = {name: {} for name in self.heads}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep what the heads said.

        Args:
            inputs: with `image_id`.
            outputs: the model's.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if image["image_id"] in self.references:
                for name in self.heads:
                    self._said[name][image["image_id"]] = str(output[name])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Figures by head, times 100. Empty except on the main process, and where there is nothing to compare."""
        parts = gathered(self._said)
        if parts is None:
            return {}
        figures = {}
        for name in self.heads:
            said = dict(itertools.chain(*(part[name].items() for part in parts)))
            if not said:
                logger.warning(
                    "%s has no captions: the head `%s` is not scored on it", self.dataset_name, name
                )
            elif not installed():
                logger.warning(
                    "the head `%s` is not scored: pycocoevalcap is not installed (`pip install pycocoevalcap`, "
                    "or visft's extra `eval`)",
                    name,
                )
            else:
                scores = caption_scores({key: self.references[key] for key in said}, said, self.metrics)
                figures[name] = scores
                table = create_small_table(scores)
                logger.info("%s, %d captions of head `%s`:\n%s", self.dataset_name, len(said), name, table)
        return figures
