"""Merging LoRA into a base from file to file, without building the model: for towers larger than memory likes.

Tensors go one by one from the base's file, LoRA added, to a file aside, are read back and compared, and only then the
file takes its name.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from visft import export
from visft.checkpoint import authors, files, load, stream_names
from visft.checkpoint.stream import TensorFile
from visft.errors import CheckpointError, ExportError
from visft.export import (
    Facts,
    card,
    open_clip_file,
    place,
    stream_merge,
    stream_write,
    timm_file,
    tower_file,
    verification,
)
from visft.modeling.backbone import open_clip_models
from visft.modeling.backbone.tower_adapters import adapt
from visft.utils import memory

logger = logging.getLogger(__name__)

LARGE = 1 << 30
"""Bytes of a base from which on our own LoRA takes this way; smaller models are built and compared by embeddings."""

_TRUNK = "visual.trunk."


@dataclass(frozen=True)
class _Kind:
    """A format that is a renaming of the merged tensors.

    Attributes:
        rename: open_clip's name to the file's; None: not in it.
        optional: beginnings of open_clip's names that a base may lack.
    """

    rename: Callable[[str], str | None]
    optional: tuple[str, ...] = ()


FORMATS = {
    "open_clip": _Kind(lambda name: name),
    "timm": _Kind(lambda name: name.removeprefix(_TRUNK) if name.startswith(_TRUNK) else None, ("head.",)),
    "safetensors": _Kind(
        lambda name: name if name.startswith("visual.") else None, ("head.", "norm.", "fc_norm.", "cls_token")
    ),
}
"""The formats that need no model."""


def base_file(cfg: CfgNode, format_name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The base's file where this way is to be taken, None where the model is to be built.

    The authors' LoRA always goes this way; ours where the base is `LARGE` or has names that open_clip does not load.

    Raises:
        ExportError: only this way could read the base, and it does not lead to the format.
        CheckpointError: the base cannot be had.
    """
    vit = cfg.MODEL.CLIP_VIT
    if not vit.PRETRAINED:
        return None
    can = format_name in FORMATS and stream_merge.is_lora_alone(shapes)
    if format_name == "timm":  # which has the tensors of open_clip's own towers under other names and shapes
        can = can and hasattr(open_clip_models.meta_tower(vit.NAME), "trunk")
    if not can and not os.path.isfile(open_clip_models.local_file(vit.PRETRAINED)):
        return None
    path = open_clip_models.weight_file(vit.NAME, vit.PRETRAINED)
    kind = base_kind(path)
    if kind == stream_names.BARE and format_name not in ("timm", "safetensors"):
        raise ExportError(
            f"MODEL.CLIP_VIT.PRETRAINED: {path} is a bare tower (names beginning with `blocks.`) without a text tower: "
            f"it can become timm or safetensors, not {format_name}; use --format timm, or give a complete CLIP."
        )
    theirs = authors.is_lora_file(shapes)
    if can and (theirs or kind != stream_names.OPEN_CLIP or os.path.getsize(path) > LARGE):
        return path if kind is not None or theirs else None
    return None


def base_kind(path: str) -> str | None:
    """Whose names a base's file has (`stream_names.kind_of`); None where that cannot be told."""
    try:
        return stream_names.kind_of(files.read_shapes(path))
    except CheckpointError:
        return None  # open_clip reads more formats than we do; it will say what is wrong


def run(
    cfg: CfgNode,
    weights: Sequence[Path],
    base: str,
    format_name: str,
    outputs: Sequence[tuple[float, Path]],
    facts: Facts,
    *,
    verify: bool = False,
) -> list[Path]:
    """Merge and write, once for each of `outputs` (a factor on LoRA's update, a file).

    Args:
        cfg: names the architecture.
        weights: LoRA's file, and heads' beside it, which are passed over.
        base: the base's file.
        format_name: one of `FORMATS`.
        facts: for the model card.
        verify: let the format's own reader load each file in a process of its own.

    Returns:
        The files written.

    Raises:
        CheckpointError: base or LoRA is broken, or does not fit the architecture by name and shape.
        ExportError: the format has no place for this tower; no space; a file reads back otherwise than written.
    """
    name, kind = cfg.MODEL.CLIP_VIT.NAME, FORMATS[format_name]
    clip = open_clip_models.meta_clip(name)
    export.check(format_name, clip.visual)
    expected = {n: tuple(t.shape) for n, t in clip.state_dict().items()}
    where = stream_merge.sites(clip.visual)
    for _, path in outputs:
        if path.exists() and os.path.samefile(path, base):
            raise ExportError(f"--output {path}: is the base itself; give another name.")
    lora_path = next(p for p in weights if stream_merge.is_lora_alone(files.read_shapes(p)))
    sha256 = _check_base(lora_path, base)
    with TensorFile(base) as source, TensorFile(lora_path) as adapters:
        names = _base_names(source, expected, name, kind)
        lora = stream_merge.LoraFile(adapters, where, cfg.MODEL.LORA.ALPHA, name)
        written = []
        for amount, path in outputs:
            tower = card.Tower(
                name,
                card.base_weights(cfg.MODEL.CLIP_VIT.PRETRAINED, sha256),
                _tuned_by(lora, clip),
                amount,
                _preprocess(clip, cfg),
            )
            pieces = stream_merge.pieces(
                source, names, lora, where, expected=expected, amount=amount, rename=kind.rename
            )
            written.append(_write(path, format_name, clip, tower, pieces, facts, verify))
        return written


def _tuned_by(lora: stream_merge.LoraFile, clip: nn.Module) -> str:
    blocks, targets = ({place[i] for place in lora.factors} for i in (0, 1))
    return (
        f"LoRA of rank {lora.rank}, alpha {lora.scale * lora.rank:g}, on {', '.join(sorted(targets))} of {len(blocks)} "
        f"of {len(adapt(clip.visual).blocks)} blocks"
    )


def _check_base(lora_path: Path, base: str) -> str:
    """The base's hash, by which our LoRA names its base."""
    found = files.sha256(base)
    load.check_file(lora_path, key="--weights", sha256=found)
    return found


def _base_names(
    source: TensorFile, expected: Mapping[str, tuple[int, ...]], architecture: str, kind: _Kind
) -> dict[str, str]:
    """The base's names by open_clip's, all accounted for."""
    what = f"MODEL.CLIP_VIT.PRETRAINED: {source.path}"
    found = stream_names.to_open_clip(source.entries, expected, what)
    wanted = {n: shape for n, shape in expected.items() if kind.rename(n) is not None}
    if found.kind != stream_names.BARE:
        wanted = expected
    optional = [n for n in wanted if n.startswith(tuple(_TRUNK + start for start in kind.optional))]
    optional = optional if found.kind == stream_names.BARE else []
    shapes = {n: entry.shape for n, entry in source.entries.items()}
    stream_names.check(found, shapes, wanted, what, architecture, optional)
    lacking = [n for n in optional if n not in found.sources]
    logger.info(
        "%s: %d tensors under the names of %s%s",
        source.path,
        len(found.sources),
        found.kind,
        f", {len(found.ignored)} ignored (open_clip computes them)" if found.ignored else "",
    )
    if lacking:
        logger.warning("%s: has no %s; the export has none either", source.path, ", ".join(lacking))
    return found.sources


def _write(
    path: Path,
    format_name: str,
    clip: nn.Module,
    tower: card.Tower,
    pieces: Sequence[stream_write.Piece],
    facts: Facts,
    verify: bool,
) -> Path:
    start, metadata = time.perf_counter(), {"format": "pt"}
    config_name, config, content, use = _described(path, format_name, clip, tower, {p.name for p in pieces})
    if config is None:
        metadata["preprocess"] = json.dumps(tower.preprocess)
    reader = ""
    with files.folder_aside(path) as folder:
        stream_write.write(folder / path.name, pieces, metadata)
        if config is not None:
            files.write_json(folder / config_name, config)
        stream_write.verify(folder / path.name, pieces)
        if verify:
            reader = verification.read(f"stored_{format_name}", folder, folder / path.name)
        checked = "reading it back, tensor by tensor" + (
            f", and {reader} in a process without visft" if verify else ""
        )
        library = "timm" if format_name == "timm" else "open_clip"
        about = card.text(tower, facts, checked, library=library, content=content, use=use)
        size = (folder / path.name).stat().st_size
        card.publish(folder, path, about, *([config_name] if config is not None else []))
    peak = memory.peak()
    logger.info(
        "wrote %s: %d tensors, %.2f GB, checked by %s, in %.1f s%s",
        path,
        len(pieces),
        size / 1e9,
        checked,
        time.perf_counter() - start,
        f", peak memory {peak / 1e9:.2f} GB = {peak / size:.3f} x the file" if peak else "",
    )
    return path


def _described(
    path: Path, format_name: str, clip: nn.Module, tower: card.Tower, names: set[str]
) -> tuple[str, dict | None, str, str]:
    """The file beside the weights (name and content, None: there is none), and what the card says of content and use.

    Raises:
        ExportError: such a file of another architecture is there.
    """
    if format_name == "open_clip":
        config = {
            "model_cfg": open_clip_models.open_clip().get_model_config(tower.name),
            "preprocess_cfg": {
                key: tower.preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")
            },
        }
        place.refuse_other(path.parent / open_clip_file.CONFIG_NAME, "model_cfg", config["model_cfg"])
        return (
            open_clip_file.CONFIG_NAME,
            config,
            open_clip_file.CONTENT,
            open_clip_file.use(tower.name, path),
        )
    if format_name == "safetensors":
        return "", None, tower_file.CONTENT, tower_file.use(tower.name, path)
    found = timm_file.architecture(clip.visual)
    if "head.weight" not in names:
        arguments = {**found.arguments, "num_classes": 0}
        found = timm_file.Architecture(found.name.split(".")[0], arguments)
    config = timm_file.config(tower.preprocess, adapt(clip.visual).embed_dim, found)
    place.refuse_other(path.parent / timm_file.CONFIG_NAME, "architecture", config["architecture"])
    return timm_file.CONFIG_NAME, config, timm_file.CONTENT, timm_file.use(found, path)


def _preprocess(clip: nn.Module, cfg: CfgNode) -> dict:
    """Of the architecture, and of the tag where the base is one."""
    vit, keys = cfg.MODEL.CLIP_VIT, ("mean", "std", "interpolation", "resize_mode")
    tag = open_clip_models.open_clip().get_pretrained_cfg(vit.NAME, vit.PRETRAINED) or {}
    known = {**clip.visual.preprocess_cfg, **{key: value for key, value in tag.items() if value is not None}}
    size = clip.visual.image_size
    found = {"size": [size, size] if isinstance(size, int) else list(size)}
    return found | {key: list(known[key]) if key in ("mean", "std") else known[key] for key in keys}
