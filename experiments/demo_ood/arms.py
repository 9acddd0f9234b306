"""What is run: the arms of a plan (arms.yaml), and the annotations of controls."""

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from demoworld.dataset import DemoData
from visft.checkpoint import files
from visft.errors import ConfigError
from visft.model_zoo import get_config_file


@dataclass(frozen=True)
class Arm:
    """One way to tune the tower. See arms.yaml."""

    name: str
    label: str
    seeds: int
    opts: dict[str, Any] = field(default_factory=dict)
    first_scene: int = 1
    classes: int = 0
    names: str = ""
    of: str = ""
    interpolate: float | None = None
    iteration: int | None = None
    suite: str = ""


@dataclass(frozen=True)
class Plan:
    """The content of arms.yaml."""

    config: str
    suite: str
    demo_world: dict[str, int]
    arms: dict[str, Arm]
    against: list[str]

    @property
    def seeds(self) -> int:
        """The largest number of seeds of an arm."""
        return max(arm.seeds for arm in self.arms.values())

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of arms to compare, each once. Arms evaluated on only some families are left out, because their means
        are not comparable."""
        whole = [arm.name for arm in self.arms.values() if not arm.suite]
        return [
            (first, second)
            for number, first in enumerate(self.against)
            for second in whole
            if second != first and second not in self.against[:number]
        ]


def read(path: Path) -> Plan:
    """Read arms.yaml.

    Raises:
        ConfigError: the file is broken, or names an unknown entry or arm.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        arms, common = {}, content["settings"]
        known = {"set", *(f.name for f in fields(Arm))} - {"name", "opts"}
        for name, entry in content["arms"].items():
            unknown = set(entry) - known
            if unknown:
                raise ConfigError(
                    f"{path}: arm `{name}` has an entry `{min(unknown)}`; known are {', '.join(sorted(known))}"
                )
            own = dict(entry)
            parent = arms.get(own.get("of", ""))
            if own.get("of") and parent is None:
                raise ConfigError(
                    f"{path}: arm `{name}` is of `{own['of']}`, but no arm before it has this name"
                )
            if parent is None:
                opts = {**common, **own.pop("set", {})}
                first_scene = own.pop("first_scene", content["demo_world"]["first"])
            else:
                opts, first_scene = parent.opts, parent.first_scene
            arms[name] = Arm(name, own.pop("label"), own.pop("seeds"), opts, first_scene, **own)
            if arms[name].names not in ("", "shuffled"):
                raise ConfigError(f"{path}: arm `{name}` has names `{arms[name].names}`; known is `shuffled`")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a valid list of arms ({error!r}); see its comment") from error
    against = content.get("against", [])
    if not set(against) <= set(arms):
        raise ConfigError(f"{path}: against is {against}; expected some of the arms {', '.join(arms)}")
    # A file beside the plan, or a config of the model zoo.
    own = path.parent / content["config"]
    config = str(own) if own.is_file() else get_config_file(content["config"])
    return Plan(config, content.get("suite", "demo"), content["demo_world"], arms, against)


def changed(content: dict[str, Any], classes: int, names: str, seed: int) -> dict[str, Any]:
    """Return COCO annotations for a control.

    Args:
        classes: the number of categories that stay annotated; smaller sets are parts of larger ones. 0: all.
        names: `shuffled`: each category gets the name of another one, sampled again for each seed. "": unchanged.
        seed: of the run.
    """
    categories = list(content["categories"])
    if classes:
        order = np.random.default_rng(0).permutation(len(categories))
        categories = [categories[i] for i in sorted(order[:classes])]
    if names == "shuffled":
        called = [row["name"] for row in categories]
        shift = np.random.default_rng(seed).permutation(len(called))
        # One cycle through all categories in random order, so none keeps its own name.
        other = {shift[i]: called[shift[(i + 1) % len(called)]] for i in range(len(called))}
        categories = [{**row, "name": other[i]} for i, row in enumerate(categories)]
    kept = {row["id"] for row in categories}
    annotations = [row for row in content["annotations"] if row["category_id"] in kept]
    return {**content, "categories": categories, "annotations": annotations}


def image_counts(scenes: Path) -> list[dict[str, int]]:
    """Return the number of training images with each category, in the form of LVIS's metadata, for federated losses."""
    content = files.read_json(DemoData(scenes).instances("train"))
    seen = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
    counts = Counter(category for category, _ in seen)
    ids = sorted(row["id"] for row in content["categories"])
    return [{"id": number, "image_count": counts[number]} for number in ids]
