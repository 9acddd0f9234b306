"""Merges LoRA into a base from file to file, without building the model, for towers that barely fit into memory.

Each tensor is read from the base's file, gets its LoRA, and is written to a temporary file. The file is read back and
compared before it gets its name.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from detectron2.config import CfgNode

from visft import export
from visft.checkpoint import authors, files, load, stream
from visft.checkpoint.files import Lazy
from visft.errors import CheckpointError, ExportError
from visft.export import base_clip, open_clip_file, timm_file, tower_file, verification, writing
from visft.export.card import Facts
from visft.export.source import Source, untouched
from visft.modeling.backbone import CLIPViT, lora, open_clip_models
from visft.utils import memory, progress

logger = logging.getLogger(__name__)

LARGE = 1 << 30
"""Bytes of a base above which our own LoRA is merged this way. Smaller models are built and compared by embeddings."""

_TRUNK = "visual.trunk."
_PLANS = {"open_clip": open_clip_file.plan, "timm": timm_file.plan, "safetensors": tower_file.plan}
"""Formats that need no model: they only rename the merged tensors."""
_MAY_LACK = {"timm": ("head.",), "safetensors": ("head.", "norm.", "fc_norm.", "cls_token")}
"""Tensors that a bare tower may lack in a format, by the beginnings of their names in timm."""


def base_file(cfg: CfgNode, format_name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the base's file if the export is to be streamed, or None if the model is to be built.

    The authors' LoRA is always streamed. Ours is if the base is `LARGE` or has names that open_clip does not load.

    Args:
        shapes: of the tensors in the LoRA file or run.

    Raises:
        ExportError: only streaming can read the base, and it cannot write the format.
        CheckpointError: the base is not available.
    """
    vit = cfg.MODEL.CLIP_VIT
    if not vit.PRETRAINED:
        return None
    can = format_name in _PLANS and _is_lora_alone(shapes)
    if format_name == "timm":  # timm has the tensors of open_clip's own towers under other names and shapes
        can = can and hasattr(open_clip_models.meta_tower(vit.NAME), "trunk")
    if not can and not os.path.isfile(open_clip_models.local_file(vit.PRETRAINED)):
        return None
    path = open_clip_models.weight_file(vit.NAME, vit.PRETRAINED)
    try:
        kind = stream.kind_of(files.read_shapes(path))
    except CheckpointError:
        kind = None  # open_clip reads more formats than we do, and says what is wrong
    if kind == stream.BARE and format_name not in _MAY_LACK:
        raise ExportError(
            f"MODEL.CLIP_VIT.PRETRAINED: {path} is a bare tower (names beginning with `blocks.`) without a text tower: "
            f"it can become timm or safetensors, not {format_name}; use --format timm, or give a complete CLIP."
        )
    theirs = authors.is_lora_file(shapes)
    if can and (theirs or kind not in (None, stream.OPEN_CLIP)):
        return path
    return path if can and kind is not None and os.path.getsize(path) > LARGE else None


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
    """Merge and write once for each of `outputs` (a factor on LoRA's update, and a file).

    Args:
        cfg: gives the architecture, and alpha of our LoRA.
        weights: the file of LoRA, and perhaps files of heads, which are ignored.
        base: the base's file.
        format_name: one for which `base_file` returns a base.
        facts: for the model card.
        verify: load each file by the library of its format, in a fresh process.

    Returns:
        The files written.

    Raises:
        CheckpointError: base or LoRA is broken, or its names and shapes do not fit the architecture.
        ExportError: the format cannot hold this tower, the disk is full, or a file reads back differently.
    """
    vit = cfg.MODEL.CLIP_VIT
    clip = open_clip_models.meta_clip(vit.NAME, vit.PRETRAINED)
    expected = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}
    export.check(format_name, clip.visual)
    for _, path in outputs:
        if path.exists() and os.path.samefile(path, base):
            raise ExportError(f"--output {path}: is the base itself; give another name.")
    adapters = next(path for path in weights if _is_lora_alone(files.read_shapes(path)))
    known = open_clip_models.BaseTower(vit.NAME, vit.PRETRAINED, files.sha256(base))
    load.check_file(adapters, key="--weights", sha256=known.sha256)
    model = _model(cfg, clip.visual, known, adapters)
    file = stream.TensorFile(base)
    names = _names(file, expected, vit.NAME, format_name)
    updates = load.tower_tensors(files.map_tensors(adapters, quiet=True), model)
    written = []
    for amount, path in outputs:
        merged = _merged(file, names, expected, model, updates, adapters, amount)
        source = replace(
            untouched(model, amount),
            config=open_clip_models.open_clip().get_model_config(vit.NAME),
            state={n.removeprefix("visual."): t for n, t in merged.items() if n.startswith("visual.")},
            outside={n: t for n, t in merged.items() if not n.startswith("visual.")},
        )
        written.append(_write(path, source, format_name, facts, verify))
    return written


def _is_lora_alone(names: Mapping[str, object]) -> bool:
    """Whether a file has LoRA and, beside it, at most heads: no other weights of a tower."""
    found = [name for name in names if authors.is_lora_file([name]) or base_clip.is_adapter(name)]
    others = set(names) - set(found)
    return bool(found) and all(name.startswith(("heads.", authors.HEAD_PREFIX)) for name in others)


def _model(cfg: CfgNode, visual: torch.nn.Module, base: open_clip_models.BaseTower, path: Path) -> CLIPViT:
    """Return the tower with the file's LoRA on `meta`, after comparing names and shapes."""
    model, options = CLIPViT(visual, base=base), lora.options(cfg)
    if authors.is_lora_file(files.read_shapes(path)):
        options["alpha"] = 1.0
    lora.inject(model, **options)
    load.load_tower(model, path)
    return model


def _names(
    file: stream.TensorFile, expected: Mapping[str, tuple[int, ...]], architecture: str, format_name: str
) -> dict[str, str]:
    """Return the base's names by open_clip's names, after checking that none is missing or left over."""
    what, kind = f"MODEL.CLIP_VIT.PRETRAINED: {file.path}", stream.kind_of(file.mapped)
    names = stream.to_open_clip(file.mapped, expected, what)
    optional: list[str] = []
    if kind == stream.BARE:
        below = _TRUNK if format_name == "timm" else "visual."
        expected = {name: shape for name, shape in expected.items() if name.startswith(below)}
        starts = tuple(_TRUNK + start for start in _MAY_LACK[format_name])
        optional = [name for name in expected if name.startswith(starts)]
    stream.check_names(names, file.shapes(), expected, what, architecture, optional)
    ignored = len(file.mapped) - len(names)
    logger.info(
        "%s: %d tensors under the names of %s%s",
        file.path,
        len(names),
        kind,
        f", {ignored} ignored (open_clip computes them)" if ignored else "",
    )
    if lacking := [name for name in optional if name not in names]:
        logger.warning("%s: has no %s; the export has none either", file.path, ", ".join(lacking))
    return names


def _merged(
    file: stream.TensorFile,
    names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    model: CLIPViT,
    updates: Mapping[str, torch.Tensor],
    adapters: Path,
    amount: float,
) -> dict[str, Lazy]:
    """Return the base's tensors with LoRA merged, by open_clip's names.

    Tensors without LoRA keep the base's type and bytes. Weights with LoRA are computed and stored in float32, because
    16 bits would round the update away.

    Args:
        updates: the matrices of LoRA by the model's names, mapped.
        adapters: their file, for messages.
        amount: a factor on the update. 1: the tuned tower, 0: the base.
    """
    at: dict[str, list[lora.Site]] = {}
    for site in lora.sites(model):
        at.setdefault(site.weight_name.replace("tower.", "visual.", 1), []).append(site)

    def merged(name: str) -> Iterator[torch.Tensor]:
        weight = file.read_into(names[name], torch.empty(expected[name]))
        for site in at[name]:
            place = f"{site.weight_name.removesuffix(site.projection.weight)}lora.{site.projection.key}"
            rows = weight[site.projection.start : site.projection.stop]
            rows += amount * site.adapter.update(updates[f"{place}.lora_A"], updates[f"{place}.lora_B"])
            if not torch.isfinite(rows).all():
                raise ExportError(
                    f"{names[name]} with the update of {adapters} is not finite; nothing was exported."
                )
        yield weight.view(-1)

    return {
        name: Lazy(torch.float32, expected[name], lambda name=name: merged(name))
        if name in at
        else file.lazy(source, expected[name])
        for name, source in names.items()
    }


def _write(path: Path, source: Source, format_name: str, facts: Facts, verify: bool) -> Path:
    plan = _PLANS[format_name](source, path)
    size = sum(map(files.nbytes, plan.tensors.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ExportError(
            f"{path.parent}: has {free / 1e9:.1f} GB left, the export takes {size / 1e9:.1f} GB; make space."
        )
    found = _ReadBack(len(plan.tensors), size)

    def check(weights: Path) -> _ReadBack:
        if verify:
            found.reader = verification.ask(plan.reader, weights, {}, plan.task)[1]
        return found

    with progress.bar(f"writing and verifying {path.name}", 2 * size, unit="B") as bar:
        tensors = {name: _counted(tensor, bar) for name, tensor in plan.tensors.items()}
        return writing.write(path, source, replace(plan, tensors=tensors), facts, check)


def _counted(tensor: torch.Tensor | Lazy, bar) -> Lazy:
    def parts() -> Iterator[torch.Tensor]:
        for part in files.parts(tensor):
            bar.update(part.nbytes)
            yield part
            del part

    return Lazy(tensor.dtype, tuple(tensor.shape), parts)


@dataclass
class _ReadBack:
    """How a file was checked, like `verification.Check`: by reading it back and, if there is one, by a `reader`."""

    tensors: int
    size: int
    reader: str = ""
    start: float = field(default_factory=time.perf_counter)

    @property
    def phrase(self) -> str:
        """The check as a phrase for the card."""
        also = f", and {self.reader} in a process without visft" if self.reader else ""
        return f"reading it back, tensor by tensor{also}"

    def log(self, path: Path) -> None:
        """Log that the export is written."""
        peak = memory.peak()
        logger.info(
            "wrote %s: %d tensors, %.2f GB, checked by %s, in %.1f s%s",
            path,
            self.tensors,
            self.size / 1e9,
            self.phrase,
            time.perf_counter() - self.start,
            f", peak memory {peak / 1e9:.2f} GB = {peak / self.size:.3f} x the file" if peak else "",
        )
