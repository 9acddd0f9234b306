"""A table of the valid values of config keys.

Rules that involve several keys are in `checks`. Rules of what a class is built from are beside the class.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from visft import export
from visft.checkpoint.run_folder import STAGES
from visft.engine.settings import value_of
from visft.errors import ConfigError, unknown
from visft.modeling import compiled
from visft.modeling.heads.common.classification import CLASS_LOSSES
from visft.modeling.heads.common.label_space import LABEL_SPACES


@dataclass(frozen=True)
class Rule:
    """A rule for the value of a key.

    Attributes:
        holds: whether a value is valid.
        expected: the same in words.
        known: the valid names, if the value is a name or a tuple of names.
    """

    holds: Callable[[Any], bool]
    expected: str
    known: tuple[str, ...] = ()


def _one_of(*known: str) -> Rule:
    return Rule(lambda value: value in known, "", tuple(name for name in known if name))


def _some_of(*known: str) -> Rule:
    return Rule(lambda value: len(value) > 0, f"some of {', '.join(known)}", known)


def _any_of(*known: str) -> Rule:
    return Rule(lambda value: True, "", known)


def _at_least(least: int, words: str = "") -> Rule:
    return Rule(lambda value: value >= least, words or f"at least {least}")


_NOT_NEGATIVE = Rule(lambda value: value >= 0, "a number of at least 0")
_AUGMENTATIONS = ("detection", "lsj", "fixed", "square")

TOWER = {
    "MODEL.CLIP_VIT.LAYER_DECAY": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
}
"""Rules for a CLIP tower, also under a stock detector."""

RUN = {
    "MODEL.VISFT.{head}.LABEL_SPACE": _one_of(*LABEL_SPACES),
    "MODEL.VISFT.{head}.CLASS_LOSS": _one_of(*CLASS_LOSSES),
    "MODEL.VISFT.{head}.FED_LOSS_CLASSES": _at_least(0, "0 (all) or a number of classes"),
    "MODEL.VISFT.{head}.MIN_WORD_COUNT": _at_least(1),
    "VISFT.STAGES": _some_of(*STAGES),
    "VISFT.TASK_MIXING": _one_of("joint", "ratio"),
    "VISFT.STRATEGY": _one_of("DDP", "FSDP2"),
    "VISFT.COMPILE": _one_of(*compiled.WHAT),
    "VISFT.EXPORT": _any_of(*export.FORMATS),
    "VISFT.PROCESS_TIMEOUT": Rule(lambda value: value > 0, "a number of minutes above 0"),
    "VISFT.INPUT.AUGMENTATION": _one_of(*_AUGMENTATIONS),
    "VISFT.INPUT.SIZE": _at_least(1, "a length in pixels"),
    "VISFT.TASKS.{head}.AUGMENTATION": _one_of("", *_AUGMENTATIONS),
    "VISFT.TASKS.{head}.IMS_PER_BATCH": _at_least(0, "0 (the common value) or a number above 0"),
    "VISFT.TASKS.{head}.SIZE": _at_least(0, "0 (the common value) or a number above 0"),
    "VISFT.TASKS.{head}.MAX_SIZE_TRAIN": _at_least(0, "0 (the common value) or a number above 0"),
    "VISFT.TASKS.{head}.MIN_SIZE_TRAIN": Rule(
        lambda sizes: all(isinstance(size, int) and size >= 1 for size in sizes), "lengths in pixels, or ()"
    ),
    "VISFT.SOLVER.{stage}.IMS_PER_BATCH": _at_least(1),
    "VISFT.SOLVER.{stage}.MAX_ITER": _at_least(1),
    "VISFT.SOLVER.{stage}.ACCUMULATE": _at_least(1),
    "VISFT.SOLVER.{stage}.WARMUP_ITERS": _at_least(0),
    "VISFT.SOLVER.{stage}.BASE_LR": _NOT_NEGATIVE,
    "VISFT.SOLVER.{stage}.WEIGHT_DECAY": _NOT_NEGATIVE,
    "VISFT.SOLVER.{stage}.CLIP_NORM": _NOT_NEGATIVE,
    "VISFT.SOLVER.{stage}.EVAL_PERIOD": _NOT_NEGATIVE,
    "VISFT.SOLVER.{stage}.CHECKPOINT_PERIOD": _NOT_NEGATIVE,
    "VISFT.SOLVER.{stage}.KEEP_CHECKPOINTS": _NOT_NEGATIVE,
}
"""Rules for a ViSFT run. `{head}` stands for each head in MODEL.VISFT.HEADS that has the key, and `{stage}` for each
stage in VISFT.STAGES."""


def check_keys(cfg: CfgNode, rules: dict[str, Rule]) -> None:
    """Check the values of keys.

    Raises:
        ConfigError: names the first key with an invalid value.
    """
    for pattern, rule in rules.items():
        for key in _keys(cfg, pattern):
            value = value_of(cfg, key)
            for name in value if isinstance(value, tuple) and rule.known else ():
                if name not in rule.known:
                    raise unknown(key, name, rule.known)
            if not rule.holds(value):
                if rule.known and isinstance(value, str):
                    raise unknown(key, value, rule.known)
                raise ConfigError(f"{key} is {value!r}; expected {rule.expected}")


def _keys(cfg: CfgNode, pattern: str) -> Iterator[str]:
    names: Iterable[str] = ("",)
    if "{head}" in pattern:
        names = cfg.MODEL.VISFT.HEADS
    elif "{stage}" in pattern:
        names = cfg.VISFT.STAGES
    for name in names:
        key = pattern.format(head=name.upper(), stage=name.upper())
        if value_of(cfg, key) is not None:
            yield key
