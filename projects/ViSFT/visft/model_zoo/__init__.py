"""Configs and weights by name, in a checkout and in an installed wheel. Listing names needs no torch or detectron2."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import TYPE_CHECKING

from visft.errors import ConfigError
from visft.model_zoo import entries

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from omegaconf import DictConfig
    from torch import nn

FOLDER = Path(__file__).with_name("configs")

__all__ = ["get", "get_config", "get_config_file", "get_file", "list"]


def list(kind: str = "configs") -> builtins.list[str]:  # noqa: A001  (as open_clip and timm name it)
    """Names of all `configs` (`visft_demo`, `lazy/fcos_clip_vit_b16`, ...), or of all weight `files`.

    Raises:
        ConfigError: another kind.
    """
    if kind == "files":
        return [*entries.entries()]
    if kind != "configs":
        raise ConfigError(f"model_zoo.list: kind is `{kind}`; expected `configs` or `files`")
    found = [*FOLDER.glob("*.yaml"), *(FOLDER / "lazy").glob("*.py")]
    return sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in found)


def get_config_file(name: str) -> str:
    """Path of the config `name`, with or without its suffix.

    Raises:
        ConfigError: there is none of that name.
    """
    stem = name.removesuffix(".yaml").removesuffix(".py")
    for suffix in (".yaml", ".py"):
        file = FOLDER / f"{stem}{suffix}"
        if file.is_file() and stem in list():
            return str(file)
    raise ConfigError(f"model_zoo has no config `{name}`; it has {', '.join(list())}")


def get_config(name: str) -> CfgNode | DictConfig:
    """The config `name`: a yacs node with ViSFT's keys, or detectron2's lazy kind for the names in `lazy/`."""
    from detectron2.config import LazyConfig, get_cfg

    from visft.config import add_visft_config

    file = get_config_file(name)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.merge_from_file(file)
    return cfg


def get(name: str, device: str = "cpu") -> nn.Module:
    """The model of the config `name`, in evaluation mode.

    The tower has the weights that the config names, the heads those of MODEL.VISFT.HEAD_FILES. Everything else is
    initialised as before training.
    """
    from detectron2.config import instantiate
    from detectron2.modeling import build_model
    from omegaconf import DictConfig

    cfg = get_config(name)
    if isinstance(cfg, DictConfig):
        return instantiate(cfg.model).to(device).eval()
    cfg.MODEL.DEVICE = device
    return build_model(cfg).eval()


def get_file(name: str) -> str:
    """Local path of weights by their name or file name, downloaded if necessary, with the SHA-256 checked.

    Raises:
        ConfigError: there are none of that name.
        CheckpointError: they cannot be downloaded, or are not the published ones.
    """
    from visft.model_zoo import cache

    return str(cache.fetch(entries.find(name)))
