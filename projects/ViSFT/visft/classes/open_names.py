"""Names to look for, from a list of words, a file, or a known data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from visft.classes.class_names import synonyms, words
from visft.classes.dataset_classes import filled_metadata
from visft.errors import ConfigError

DATA_SETS = {"coco": "coco_2017_val", "lvis": "lvis_v1_val", "objects365": "objects365_v2_val"}
"""Registered data sets by the word for their classes; their files need not exist."""

TEST = "test"
"""Stands for the classes of the data set that is evaluated."""


@dataclass(frozen=True)
class OpenNames:
    """Names to look for."""

    shown: tuple[str, ...]
    """Name of each class in drawings; predicted classes index it."""
    synonyms: tuple[tuple[str, ...], ...]
    """Names of each class for the text encoder."""


def names_of(data_set: str) -> OpenNames:
    """The classes of a registered data set, which is loaded if its metadata lack them.

    Raises:
        ConfigError: it is not registered, or has no classes.
    """
    if data_set not in DatasetCatalog.list():
        raise ConfigError(f"`{data_set}` is not a registered data set, so it has no names to look for")
    metadata = filled_metadata(data_set, "thing_classes")
    if not metadata.get("thing_classes"):
        raise ConfigError(
            f"the metadata of {data_set} has no thing_classes to look for: fill it when registering"
        )
    return OpenNames(tuple(metadata.thing_classes), tuple(synonyms(metadata)))


def read_names(key: str, given: Sequence[str]) -> OpenNames:
    """Names from a config key or an option.

    Args:
        key: their origin, for messages.
        given: names, or one entry: a key of `DATA_SETS`, or a .txt file with a name per line.

    Raises:
        ConfigError: there is no name, or no such file.
    """
    if len(given) == 1 and given[0] in DATA_SETS:
        data_set = DATA_SETS[given[0]]
        if MetadataCatalog.get(data_set).get("thing_classes") or given[0] == "objects365":
            return names_of(data_set)
        return _builtin(given[0])
    if len(given) == 1 and given[0].endswith(".txt"):
        given = _lines(key, given[0])
    names = tuple(dict.fromkeys(name for text in given if (name := " ".join(text.split()))))
    if not names:
        raise ConfigError(
            f"{key} has no name; expected names such as `red panda`, one of {', '.join(DATA_SETS)}, or a .txt file "
            "with a name a line"
        )
    return OpenNames(names, tuple(words(name) for name in names))


def _lines(key: str, file: str) -> list[str]:
    try:
        return Path(os.path.expanduser(file)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"{key} names the file {file}, which cannot be read ({reason}); give a .txt file with "
                          "a name a line") from error  # fmt: skip


def _builtin(word: str) -> OpenNames:
    """Classes of COCO or LVIS, whose metadata detectron2 fills only when it reads the annotations."""
    from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
    from detectron2.data.datasets.lvis import get_lvis_instances_meta

    if word == "lvis":
        fields = get_lvis_instances_meta("lvis_v1") | {"evaluator_type": "lvis"}
    else:
        fields = _get_builtin_metadata("coco")
    metadata = Metadata(
        name=word, thing_classes=fields["thing_classes"], evaluator_type=fields.get("evaluator_type")
    )
    return OpenNames(tuple(metadata.thing_classes), tuple(synonyms(metadata)))
