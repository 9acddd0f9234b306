"""What a benchmark is, and the list of those there are."""

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
"""In the order of reports."""

SUITES = ("demo", "real")


@dataclass(frozen=True)
class Context:
    """What the user gave.

    Args:
        images: folder of another vendor's emoji, named by code points; None: not given.
        data: folder of the real suite's data sets; None: not given.
        split: `test`, or `development`: other items, to choose a recipe by.
    """

    images: Path | None = None
    data: Path | None = None
    split: str = "test"


class Benchmark:
    """One benchmark. A subclass sets the names and writes `images` and `items`; `@register` makes it known.

    An item is what is drawn anew in the bootstrap: an image, a class, a pair, whatever is independent of the
    others. Item i must be the same thing for every tower and every seed. What was drawn at random for a seed (views,
    shots, the start of a readout) depends on `seed` alone, so that towers are compared in pairs.

    Attributes:
        name: unique, as `--suite` takes it.
        family: one of `FAMILIES`. A family's figure is the mean over its benchmarks.
        metric: what the figure is, for people.
        suite: `demo` or `real`.
        in_domain: whether it is tested on the fine-tuning's data set of images; reported, but counted in no mean.
        max_seeds: how many seeds make a difference; None: as many as are asked for.
        quick_seeds: how many of these a suite takes, where a readout is expensive; None: all.
        item_set: a name that benchmarks share whose items are the same things in the same order; "": none do.
        readout_seconds: what a seed takes besides the images that pass the tower, in seconds of one CPU core with the
            demo's tower. The time that is left is told by it; a rough number will do.
        version: raised when the same images give other figures than before, so that old results are not taken up.
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
        """Keep what is needed of the context.

        Raises:
            DataError: the data are there, but broken.
        """
        self.context = context

    @classmethod
    def missing(cls, context: Context) -> str | None:
        """Why it cannot be run (`needs --pictures`, a folder that is not there); None: it can."""
        return None

    def images(self, seed: int) -> Mapping[str, Images]:
        """The sets of images that `items` will ask features of, under names of its own choice. Renders none."""
        raise NotImplementedError

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        """The items' scores, `[n]` or `[n, k]`, in 0..1 where they are shares.

        Args:
            tower: `embeddings(images["..."])`, `dense(...)`, `text([...])`.
            images: what `images(seed)` returned.
        """
        raise NotImplementedError

    def figure(self, means: np.ndarray) -> np.ndarray:
        """The figure (in 0..1) from the items' mean scores.

        Every metric that is a function of sums over items can be written so: mean IoU from intersections and unions by
        class, class-mean accuracy from hits and counts by class.

        Args:
            means: `[..., k]`, the mean over (resampled) items.

        Returns:
            `[...]`; here the mean over k.
        """
        return means.mean(-1)

    def baselines(self) -> Mapping[str, float]:
        """Figures (in 0..1) that need no tower, by name: chance, what can be told without the image. Shown beside."""
        return {}


_registry: dict[str, type[Benchmark]] = {}
_Class = TypeVar("_Class", bound=type[Benchmark])


def register(cls: _Class) -> _Class:
    """Make a benchmark known (a class decorator).

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
    """Make a benchmark known that differs from `base` in attributes alone.

    Args:
        about: its docstring.
    """
    body = {"name": name, "__doc__": about, "__module__": base.__module__}
    return register(type(f"{base.__name__} {name}", (base,), body | attributes))


def registered() -> dict[str, type[Benchmark]]:
    """All benchmarks by name, in the order of their families; those of the package are imported now."""
    for suite in SUITES:
        package = importlib.import_module(f"{__package__}.{suite}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    order = {family: place for place, family in enumerate(FAMILIES)}
    return dict(sorted(_registry.items(), key=lambda entry: (order[entry[1].family], entry[0])))


def resolve(suite: str | Sequence[str]) -> list[type[Benchmark]]:
    """The benchmarks that `--suite` names: suites, families (of both suites, or `demo/FAMILY`), benchmarks, by commas.

    Raises:
        ConfigError: a name is none of these.
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
