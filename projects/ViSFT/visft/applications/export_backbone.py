"""`tools/export_backbone.py`: exports the tower of a run, or a base with a LoRA file, without training."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from visft import export
from visft.checkpoint import authors, files, load
from visft.checkpoint.run_folder import describe
from visft.engine import exporting
from visft.engine.settings import load_config
from visft.errors import CheckpointError, ConfigError, ExportError
from visft.modeling.backbone import open_clip_models
from visft.modeling.backbone.tower_adapters import adapt

logger = logging.getLogger(__name__)

# The authors' two towers by width and depth. The first of each was used; the other has another text tower.
_AUTHORS_TOWERS = {
    (1408, 40): ("EVA01-g-14", "EVA01-g-14-plus"),
    (1792, 64): ("EVA02-E-14-plus", "EVA02-E-14"),
}


def run(arguments: argparse.Namespace) -> list[Path]:
    """Check everything, then build the tower, load and export; returns the files written."""
    paths = load.check_file(arguments.weights, key="--weights")
    cfg = _config(arguments, paths)
    shapes = {name: shape for path in paths for name, shape in files.read_shapes(path).items()}
    vit = cfg.MODEL.CLIP_VIT
    open_clip_models.check_name(vit.NAME)
    open_clip_models.check_pretrained(vit.NAME, vit.PRETRAINED)
    _check_shapes(cfg, shapes, arguments.weights)
    load.check_file(arguments.weights, key="--weights", architecture=vit.NAME)
    outputs = _outputs(arguments)
    if not vit.PRETRAINED:
        logger.warning("MODEL.CLIP_VIT.PRETRAINED is empty: the base has random weights")
    return exporting.export_files(
        cfg,
        arguments.weights,
        arguments.format,
        outputs,
        exporting.facts(cfg, arguments.weights),
        seed=_seed(arguments.weights),
        verify=arguments.verify,
    )


def _config(arguments: argparse.Namespace, paths: Sequence[Path]) -> CfgNode:
    """The config file's, or else what the weights record; KEY VALUE pairs override both."""
    known: dict[str, Any] = {}
    if not arguments.config_file:
        given = dict(zip(arguments.opts[::2], arguments.opts[1::2], strict=False))
        for path in paths:
            known |= _said(path, given.get("MODEL.CLIP_VIT.PRETRAINED", ""))
        if "MODEL.CLIP_VIT.NAME" not in known and "MODEL.CLIP_VIT.NAME" not in arguments.opts[::2]:
            raise ConfigError(
                f"--weights {arguments.weights}: does not say which tower it belongs to, and its shapes fit none or "
                "several; give --config-file, or MODEL.CLIP_VIT.NAME and MODEL.CLIP_VIT.PRETRAINED after the options."
            )
    opts = [str(word) for pair in known.items() for word in pair]
    return load_config(arguments.config_file, [*opts, *arguments.opts])


def _said(path: Path, pretrained: str) -> dict[str, Any]:
    """Config keys and values from a checkpoint's metadata, or from the shapes of the authors' LoRA and the base."""
    about, known = describe(path), {}
    base = about.get("base") or {}
    adapters = (about.get("settings") or {}).get("lora") or {}
    if base.get("name"):
        known["MODEL.CLIP_VIT.NAME"] = base["name"]
        known["MODEL.CLIP_VIT.PRETRAINED"] = base.get("pretrained") or ""
    known |= {f"MODEL.LORA.{key.upper()}": value for key, value in adapters.items()}
    shapes = files.read_shapes(path)
    if authors.is_lora_file(shapes):
        width, depth, rank = authors.check_lora(shapes, path)
        known |= {"MODEL.LORA.RANK": rank, "MODEL.LORA.ALPHA": 1.0, "MODEL.LORA.TARGETS": "('q', 'v')"}
        if (width, depth) in _AUTHORS_TOWERS:
            known["MODEL.CLIP_VIT.NAME"] = _fitting(_AUTHORS_TOWERS[width, depth], pretrained)
    return known


def _fitting(names: Sequence[str], pretrained: str) -> str:
    """The first architecture that fits the base (a tag or a file), or the first of all if none does."""
    module = open_clip_models.open_clip()
    tagged = [name for name in names if pretrained and module.get_pretrained_cfg(name, pretrained)]
    if tagged or not os.path.isfile(open_clip_models.local_file(pretrained)):
        return (tagged or names)[0]
    found = files.read_shapes(pretrained).values()
    texts = [(49408, module.get_model_config(name)["text_cfg"]["width"]) for name in names]
    return next((name for name, shape in zip(names, texts, strict=True) if shape in found), names[0])


def _check_shapes(cfg: CfgNode, shapes: dict[str, tuple[int, ...]], weights: str) -> None:
    """Refuse a config whose tower or rank disagrees with the LoRA's shapes, before the tower is built."""
    found = {name: shape for name, shape in shapes.items() if name.endswith("lora_A") and "blocks." in name}
    if not found:
        return
    theirs = authors.is_lora_file(shapes)
    if theirs:
        authors.check_lora(shapes, f"--weights {weights}")
        if set(cfg.MODEL.LORA.TARGETS) != {"q", "v"} or cfg.MODEL.LORA.LAST_BLOCKS:
            raise CheckpointError(
                f"--weights {weights}: the authors' LoRA is on q and v of all blocks, the config has "
                f"MODEL.LORA.TARGETS {tuple(cfg.MODEL.LORA.TARGETS)} and LAST_BLOCKS {cfg.MODEL.LORA.LAST_BLOCKS}; "
                "set them to ('q', 'v') and 0."
            )
    tower = adapt(open_clip_models.meta_tower(cfg.MODEL.CLIP_VIT.NAME))
    depth = 1 + max(int(name.split("blocks.")[1].split(".")[0]) for name in found)
    attention = [shape for name, shape in found.items() if ".attn." in name or ".lora.q." in name]
    widths = {shape[1] for shape in attention}
    if (
        depth > len(tower.blocks)
        or (theirs and depth < len(tower.blocks))
        or (widths and widths != {tower.embed_dim})
    ):
        raise CheckpointError(
            f"--weights {weights}: its LoRA is for a tower of {depth} blocks and width {min(widths or {0})}, "
            f"MODEL.CLIP_VIT.NAME {cfg.MODEL.CLIP_VIT.NAME} has {len(tower.blocks)} and {tower.embed_dim}; name the "
            "tower that it was trained on."
        )
    halves = 2 if theirs else 1
    ranks = {shape[0] // halves for shape in found.values()}
    if ranks != {cfg.MODEL.LORA.RANK}:
        raise CheckpointError(
            f"--weights {weights}: its LoRA has rank {min(ranks)}, MODEL.LORA.RANK is {cfg.MODEL.LORA.RANK}; set it to "
            f"{min(ranks)}."
        )


def _outputs(arguments: argparse.Namespace) -> list[tuple[float, Path]]:
    path, suffixes = Path(arguments.output), export.FORMATS[arguments.format].suffixes
    is_folder = suffixes == ("",)
    if path.suffix not in suffixes and not is_folder:
        raise ExportError(f"--output {path}: the name must end in {' or '.join(suffixes)}.")
    amounts = arguments.interpolate or [1.0]
    outside = [amount for amount in amounts if not 0 <= amount <= 1]
    if outside:
        raise ConfigError(
            f"--interpolate {outside[0]:g}: expected numbers from 0 (the base) to 1 (the tuned tower)."
        )
    if len(amounts) == 1:
        return [(amounts[0], path)]
    stem, suffix = (path.name, "") if is_folder else (path.stem, path.suffix)
    return [(amount, path.with_name(f"{stem}-{amount:.2f}{suffix}")) for amount in amounts]


def _seed(weights: str | os.PathLike) -> int | None:
    """A run's seed, from which its random base can be rebuilt; None if there is none."""
    state = Path(weights) / "run.json"
    return files.read_json(state).get("seed") if state.is_file() else None
