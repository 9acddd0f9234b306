"""The configs and weights that come with the package, by name, in a checkout and in an installed wheel alike."""

import builtins
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import files
from ..config import add_visft_config
from ..errors import CheckpointError, ConfigError

FOLDER = Path(__file__).with_name("configs")
WEIGHTS = Path(__file__).parents[1] / "data" / "demo_world" / "weights"
SUMS = WEIGHTS / "SHA256SUMS"
"""Which weights there are, and their hashes, as `sha256sum *.safetensors` prints them."""

__all__ = ["get", "get_config", "get_config_file", "get_file", "list"]


def list() -> builtins.list[str]:  # noqa: A001  (as open_clip and timm name it; used as model_zoo.list())
    """Names of all configs: `visft_demo`, `lazy/fcos_clip_vit_b16`, ..."""
    files = [*FOLDER.glob("*.yaml"), *(FOLDER / "lazy").glob("*.py")]
    return sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in files)


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
    file = get_config_file(name)
    if file.endswith(".py"):
        return LazyConfig.load(file)
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.merge_from_file(file)
    return cfg


def get(name: str, device: str = "cpu") -> nn.Module:
    """The model of the config `name`, in evaluation mode, its tower with the weights that the config names.

    The other parts are as they are before training.
    """
    from detectron2.config import instantiate
    from detectron2.modeling import build_model

    cfg = get_config(name)
    if isinstance(cfg, DictConfig):
        return instantiate(cfg.model).to(device).eval()
    cfg.MODEL.DEVICE = device
    return build_model(cfg).eval()


def get_file(name: str) -> str:
    """Path of the weights `name` that come with the package, with or without suffix, its SHA-256 checked.

    Raises:
        ConfigError: there are none of that name.
        CheckpointError: the file is not there, or is not the one that was published.
    """
    hashes = {file: digest for digest, file in (line.split() for line in SUMS.read_text().splitlines())}
    file = f"{name.removesuffix('.safetensors')}.safetensors"
    if file not in hashes:
        known = ", ".join(sorted(known.removesuffix(".safetensors") for known in hashes))
        raise ConfigError(f"model_zoo has no weights `{name}`; it has {known}")
    path = WEIGHTS / file
    found = files.sha256(path) if path.is_file() else "none"
    if found != hashes[file]:
        raise CheckpointError(
            f"{path} has SHA-256 {found}, expected {hashes[file]}: install visft again, or `git checkout` the file"
        )
    return str(path)
