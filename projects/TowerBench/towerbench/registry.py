"""The base class of benchmarks, and their registry."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from towerbench.errors import ConfigError
from towerbench.features import FeatureStore, Images

FAMILIES = (
    "zero-shot",
    "few-shot",
    "retrieval",
    "ocr",
    "goi",
    "vqa",
    "captioning",
    "dense",
    "robustness",
)
"""The families, in the order of reports."""

SUITES = ("demo", "real")


@dataclass(frozen=True)
class Context:
    """The user's options.

    Args:
        images: folder of another vendor's emoji, named by code points. None: not given.
        data: folder with the data sets of the real suite. None: not given.
        split: `test`, or `development`: other items, for choosing a recipe.
    """

    images: Path | None = None
    data: Path | None = None
    split: str = "test"


class Benchmark:
    """A benchmark. A subclass sets the names and defines `images` and `items`; `@register` registers it.

    The bootstrap resamples items: images, classes, pairs, or anything else that is independent of the others. Item i
    must be the same for every tower and every seed. Random choices (views, shots, the start of a readout) depend only
    on `seed`, so that towers are compared in pairs.

    Attributes:
        name: unique, as `--suite` takes it.
        family: one of `FAMILIES`. A family's figure is the mean over its benchmarks.
        metric: name of the figure, for readers.
        suite: `demo` or `real`.
        in_domain: whether it uses the data set of the fine-tuning. It is reported, but not part of any mean.
        max_seeds: number of seeds that give different results. None: any number.
        quick_seeds: number of these that a suite uses, if a readout is expensive. None: all.
        item_set: a name shared by benchmarks with the same items in the same order. "": there are none.
        readout_seconds: time of a seed without the tower's passes, in seconds of one CPU core with the demo tower. It
            is used to estimate the remaining time, so a rough number is enough.
        version: increased when the same images give other figures than before, so that old results are not reused.
    """

    name = family = metric = ""
    suite = "demo"
    in_domain = False
    max_seeds: int | None = None
    quick_seeds: int | None = None
    item_set = ""
    readout_seconds = 1.0
    version = 1

    def __init__(self, context: Context) -> None:
        """Read what is needed from the context.

        Raises:
            DataError: the data exist, but are broken.
        """
        self.context = context

    @classmethod
    def missing(cls, context: Context) -> str | None:
        """Return the reason why it cannot be run (`needs --pictures`, a missing folder). None: it can."""
        return None

    def images(self, seed: int) -> Mapping[str, Images]:
        """Return the sets of images that `items` needs, under names of its choice. Renders none."""
        raise NotImplementedError

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        """Return the items' scores, `[n]` or `[n, k]`, in 0..1 if they are shares.

        Args:
            tower: `embeddings(images["..."])`, `dense(...)`, `text([...])`.
            images: from `images(seed)`.
        """
        raise NotImplementedError

    def figure(self, means: np.ndarray) -> np.ndarray:
        """Return the figure (in 0..1) from the items' mean scores.

        Any metric that is a function of sums over items has this form, such as mean IoU (intersections and unions by
        class) and class-mean accuracy (hits and counts by class).

        Args:
            means: `[..., k]`, the mean over (resampled) items.

        Returns:
            `[...]`. By default, the mean over k.
        """
        return means.mean(-1)

    def baselines(self) -> Mapping[str, float]:
        """Return figures (in 0..1) without a tower, by name, for reports: chance, or the score without the image."""
        return {}


_registry: dict[str, type[Benchmark]] = {}
_Class = TypeVar("_Class", bound=type[Benchmark])


def register(cls: _Class) -> _Class:
    """Register a benchmark (a class decorator).

    Raises:
        ConfigError: its family or suite is unknown, or its name is taken.
    """
    if cls.family not in FAMILIES:
        raise ConfigError(f"benchmark `{cls.name}`: family `{cls.family}` is none of {', '.join(FAMILIES)}")
    if cls.suite not in SUITES:
        raise ConfigError(f"benchmark `{cls.name}`: suite `{cls.suite}` is none of {', '.join(SUITES)}")
    if not cls.name or _registry.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ConfigError(f"benchmark `{cls.name}`: the name is empty or taken; choose another")
    _registry[cls.name] = cls
    return cls


def variant(base: type[Benchmark], name: str, about: str, **attributes: object) -> type[Benchmark]:
    """Register a benchmark that differs from `base` only in attributes.

    Args:
        about: its docstring.
    """
    body = {"name": name, "__doc__": about, "__module__": base.__module__}
    return register(type(f"{base.__name__} {name}", (base,), body | attributes))


def registered() -> dict[str, type[Benchmark]]:
    """Return all benchmarks by name, in the order of their families. Imports those of the package."""
    for suite in SUITES:
        package = importlib.import_module(f"{__package__}.{suite}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    order = {family: place for place, family in enumerate(FAMILIES)}
    return dict(sorted(_registry.items(), key=lambda entry: (order[entry[1].family], entry[0])))


def resolve(suite: str | Sequence[str]) -> list[type[Benchmark]]:
    """Return the benchmarks for `--suite`: comma-separated suites, families (or `demo/FAMILY`) and benchmarks.

    Raises:
        ConfigError: an unknown name.
    """
    names = [name.strip() for name in (suite.split(",") if isinstance(suite, str) else suite)]
    known, found = registered(), []
    for name in names:
        matching = [
            cls
            for cls in known.values()
            if name in (cls.name, cls.family, cls.suite, f"{cls.suite}/{cls.family}")
        ]
        if not matching:
            from difflib import get_close_matches

            families = dict.fromkeys(cls.family for cls in known.values())
            every = [
                *SUITES,
                *families,
                *(f"{suite}/{family}" for suite in SUITES for family in families),
                *known,
            ]
            near = get_close_matches(name, every, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"--suite: `{name}` is no suite, family or benchmark; the nearest is `{near}` ({', '.join(every)})"
            )
        found += matching
    return [cls for cls in known.values() if cls in found]
