"""Builds the vocabulary of a caption head from its training captions."""

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import DatasetCatalog

from visft.data.datasets.captions import captions_of, read_captions
from visft.errors import DataError
from visft.modeling.heads.captioning.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def build_vocabulary(sources: Iterable[str], min_count: int = 5) -> Vocabulary:
    """Return the words that occur at least `min_count` times, by decreasing frequency, then alphabetically.

    Args:
        sources: caption files (COCO's format), or names of registered data sets.

    Raises:
        DataError: a source is unknown or broken, none has captions, or no word occurs often enough.
    """
    sources = list(sources)
    captions = [caption for source in sources for caption in _captions(source)]
    names = ", ".join(sources)
    if not captions:
        raise DataError(
            f"{names}: no captions there, so no vocabulary can be built; put COCO's captions_*.json beside its "
            "instances_*.json, or set VISFT.DATA.TRAIN_CAPTIONS or TRAIN_SHARDS for your own data"
        )
    vocabulary = Vocabulary.build(captions, min_count)
    if len(vocabulary) == len(Vocabulary([])):
        raise DataError(
            f"{names}: no word occurs {min_count} times in its {len(captions)} captions; build with a lower count"
        )
    logger.info("%s: %d captions, a vocabulary of %d", names, len(captions), len(vocabulary))
    return vocabulary


def _captions(source: str) -> list[str]:
    if source in DatasetCatalog:
        found = captions_of(source)
    elif source.endswith(".json"):
        found = read_captions(source)
    else:
        raise DataError(f"{source}: is neither a caption file (.json) nor the name of a registered data set")
    return [caption for captions in found.values() for caption in captions]


def write_vocabulary(args: argparse.Namespace) -> Path:
    """Run `tools/build_vocabulary.py`: build from `captions` and write to `output`, which is returned."""
    if args.min_count < 1:
        raise DataError(f"--min-count {args.min_count}: expected at least 1")
    build_vocabulary(args.captions, args.min_count).write(args.output)
    return Path(args.output)
