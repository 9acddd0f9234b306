"""Names for open-vocabulary predictions: a list, a file, or the classes of a known data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from visft.classes.class_names import synonyms, words
from visft.classes.dataset_classes import filled_metadata
from visft.errors import ConfigError

DATA_SETS = {"coco": "coco_2017_val", "lvis": "lvis_v1_val", "objects365": "objects365_v2_val"}
"""Words that stand for the classes of a registered data set, whose files need not exist."""

TEST = "test"
"""Stands for the classes of the evaluated data set."""


@dataclass(frozen=True)
class OpenNames:
    """Classes to predict."""

    shown: tuple[str, ...]
    """The name of each class to show, by the index of the class."""
    synonyms: tuple[tuple[str, ...], ...]
    """The phrases that the text encoder reads for each class."""


def names_of(data_set: str) -> OpenNames:
    """Return the classes of a registered data set. Loads the data set if its metadata lack them.

    Raises:
        ConfigError: the data set is not registered, or has no classes.
    """
    if data_set not in DatasetCatalog.list():
        raise ConfigError(f"`{data_set}` is not a registered data set, so it has no names to look for")
    metadata = filled_metadata(data_set, "thing_classes")
    if not metadata.get("thing_classes"):
        raise ConfigError(
            f"the metadata of {data_set} has no thing_classes to look for; set it when you register the data set"
        )
    return OpenNames(tuple(metadata.thing_classes), tuple(synonyms(metadata)))


def read_names(key: str, given: Sequence[str]) -> OpenNames:
    """Read names from a config key or an option.

    Args:
        key: the key or option, for messages.
        given: names, or one entry: a word in `DATA_SETS`, or a .txt file with one name per line.

    Raises:
        ConfigError: there is no name, or the file cannot be read.
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
            "with one name per line"
        )
    return OpenNames(names, tuple(words(name) for name in names))


def _lines(key: str, file: str) -> list[str]:
    try:
        return Path(os.path.expanduser(file)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"{key} names the file {file}, which cannot be read ({reason}); give a .txt file with "
                          "one name per line") from error  # fmt: skip


def _builtin(word: str) -> OpenNames:
    """Return the classes of COCO or LVIS. detectron2 fills their metadata only when it reads the annotations."""
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
