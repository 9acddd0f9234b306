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

from visft.backbone import open_clip_zoo
from visft.checkpoint import authors, export_check, files, load, stream_merge, stream_names, stream_write
from visft.checkpoint.run import describe
from visft.checkpoint.stream import TensorFile, open_tensors
from visft.errors import CheckpointError, ExportError

logger = logging.getLogger(__name__)

LARGE = 1 << 30
"""Bytes of a base from which on our own LoRA takes this way; smaller models are built and compared by embeddings."""

CONFIG_NAME = "open_clip_config.json"
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
    if not can and not os.path.isfile(open_clip_zoo.local_file(vit.PRETRAINED)):
        return None
    path = open_clip_zoo.weight_file(vit.NAME, vit.PRETRAINED)
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
    verify: bool = False,
) -> list[Path]:
    """Merge and write, once for each of `outputs` (a factor on LoRA's update, a file).

    Args:
        cfg: names the architecture.
        weights: LoRA's file, and heads' beside it, which are passed over.
        base: the base's file.
        format_name: one of `FORMATS`.
        verify: let the format's own reader load each file in a process of its own.

    Returns:
        The files written.

    Raises:
        CheckpointError: base or LoRA is broken, or does not fit the architecture by name and shape.
        ExportError: the format has no place for this tower; no space; a file reads back otherwise than written.
    """
    name, kind = cfg.MODEL.CLIP_VIT.NAME, FORMATS[format_name]
    clip = open_clip_zoo.meta_clip(name)
    expected = {n: tuple(t.shape) for n, t in clip.state_dict().items()}
    where = stream_merge.sites(clip.visual)
    if format_name == "timm" and not any(n.startswith(_TRUNK) for n in expected):
        raise ExportError(
            f"--format timm: {name} is a tower of open_clip's own, which timm's models do not hold."
        )
    for _, path in outputs:
        if path.exists() and os.path.samefile(path, base):
            raise ExportError(f"--output {path}: is the base itself; give another name.")
    lora_path = next(p for p in weights if stream_merge.is_lora_alone(files.read_shapes(p)))
    _check_base(lora_path, base)
    with open_tensors(base) as source, open_tensors(lora_path) as adapters:
        names = _base_names(source, expected, name, kind)
        lora = stream_merge.LoraFile(adapters, where, cfg.MODEL.LORA.ALPHA, name)
        return [
            _write(path, format_name, clip, cfg, verify, stream_merge.pieces(
                source, names, lora, where, expected=expected, amount=amount, rename=kind.rename
            ))
            for amount, path in outputs
        ]  # fmt: skip


def _check_base(lora_path: Path, base: str) -> None:
    """Our LoRA names its base by hash."""
    named = (describe(lora_path).get("base") or {}).get("sha256")
    if named:
        load.check_file(lora_path, key="--weights", sha256=files.sha256(base))


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
    cfg: CfgNode,
    verify: bool,
    pieces: Sequence[stream_write.Piece],
) -> Path:
    start, config = time.perf_counter(), None
    if format_name == "open_clip":
        config = _open_clip_config(clip, cfg)
        _refuse_other_config(path.parent / CONFIG_NAME, config["model_cfg"])
    with files.folder_aside(path) as folder:
        stream_write.write(folder / path.name, pieces, {"format": "pt"})
        if config is not None:
            files.write_json(folder / CONFIG_NAME, config)
        stream_write.verify(folder / path.name, pieces)
        if verify:
            arguments = [folder / path.name]
            if format_name == "timm":
                arguments.append(clip.visual.trunk.default_cfg["architecture"])
            export_check.read(f"stored_{format_name}", folder, *arguments)
        size = (folder / path.name).stat().st_size
        files.put_in_place(folder / path.name, path)
        if config is not None:
            files.put_in_place(folder / CONFIG_NAME, path.parent / CONFIG_NAME)
    peak = peak_memory()
    logger.info(
        "wrote %s: %d tensors, %.2f GB, read back and compared%s, in %.1f s%s",
        path,
        len(pieces),
        size / 1e9,
        f", loaded by {format_name}" if verify else "",
        time.perf_counter() - start,
        f", peak memory {peak / 1e9:.2f} GB = {peak / size:.3f} x the file" if peak else "",
    )
    return path


def _open_clip_config(clip: nn.Module, cfg: CfgNode) -> dict:
    module, vit = open_clip_zoo.open_clip(), cfg.MODEL.CLIP_VIT
    tag = module.get_pretrained_cfg(vit.NAME, vit.PRETRAINED) or {}
    known = {**clip.visual.preprocess_cfg, **{key: value for key, value in tag.items() if value is not None}}
    preprocess = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return {"model_cfg": module.get_model_config(vit.NAME), "preprocess_cfg": preprocess}


def _refuse_other_config(path: Path, model_config: dict) -> None:
    """The folder's description speaks for all weights in it."""
    if path.exists() and files.read_json(path).get("model_cfg") != json.loads(json.dumps(model_config)):
        raise ExportError(f"{path}: belongs to another architecture; write the export to another folder.")


def peak_memory() -> int | None:
    """The most memory in bytes that this process has had resident so far, mapped pages counted; None: not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
