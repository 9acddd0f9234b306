"""Loads weights and reports on every tensor: loaded, ignored (and why), missing, or of another shape."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visft.checkpoint import authors
from visft.checkpoint.copying import LoadReport, groups, load_into, some
from visft.checkpoint.files import read_shapes, read_tensors
from visft.checkpoint.run_folder import describe, head_file, run_files
from visft.errors import CheckpointError

logger = logging.getLogger(__name__)


def load_heads(
    model: nn.Module, files: Sequence[str | os.PathLike], reinit: Iterable[str] = ()
) -> dict[str, LoadReport]:
    """Start heads from files (`MODEL.VISFT.HEAD_FILES`), ours or the authors'.

    A file may hold several heads. Those that the model lacks are ignored. A head that no file holds stays fresh, which
    is logged. A head that a file holds only in part is an error.

    Args:
        model: has its heads in the module dictionary `heads`.
        files: weight files, or folders of runs.
        reinit: names of the heads whose class layers may start anew if the number of classes differs.

    Returns:
        The report of each head that was loaded.

    Raises:
        CheckpointError: a file is unreadable, holds no head of the model, or does not fit.
    """
    reinit, reports = set(reinit), {}
    for given in files:
        path = head_file(given)
        tensors = read_tensors(path)
        heads = split_heads(tensors, path)
        if authors.is_head_file(tensors):
            only = authors.head_of_file(path)
            LoadReport(ignored=authors.ignored_in_heads(tensors, path, only)).log_ignored(str(path))
        found = [name for name in heads if name in model.heads]
        if not found:
            raise CheckpointError(
                f"{path}: holds weights of the heads {', '.join(heads)}, the model has "
                f"{', '.join(model.heads)}; "
                "name a file of one of these in MODEL.VISFT.HEAD_FILES."
            )
        for name in heads:
            if name not in found:
                logger.info("%s: ignored the head `%s`, which the model does not have", path, name)
                continue
            head, key = model.heads[name], f"MODEL.VISFT.{name.upper()}.REINIT_CLASSES"
            reports[name] = load_into(
                head,
                heads[name],
                what=f"{path}, head `{name}`",
                reinit=class_layer_names(head) if name in reinit else (),
                hint=f"If only the number of classes differs, set {key} True to start the class layer anew.",
            )
    for name in model.heads:
        if files and name not in reports:
            logger.info("head `%s` starts fresh: no file in MODEL.VISFT.HEAD_FILES holds it", name)
    return reports


def class_layer_names(head: nn.Module) -> list[str]:
    """Return the names of a head's tensors whose first dimension is the number of classes.

    A head lists its modules or parameters of this kind in `class_layers`.
    """
    layers = tuple(getattr(head, "class_layers", ()))
    return [name for name in head.state_dict() if f"{name}.".startswith(tuple(f"{x}." for x in layers))]


def split_heads(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """Sort a file's tensors by head, under the head's own parameter names.

    Raises:
        CheckpointError: the file has no tensors of a head, or an unknown name among the authors'.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    if authors.is_head_file(tensors):
        only = authors.head_of_file(path)
        authors.ignored_in_heads(tensors, path, only)
        heads = authors.split_heads(tensors, only)
    else:
        for name, tensor in tensors.items():
            if name.startswith("heads.") and name.count(".") > 1:
                _, head, inner = name.split(".", 2)
                heads.setdefault(head, {})[inner] = tensor
    if not heads:
        raise CheckpointError(
            f"{path}: holds no head's weights (names like {some(list(tensors), limit=2)}); names "
            f"beginning with "
            "`heads.` (ours) or `visft_heads.` (the authors') were expected."
        )
    return heads


def load_run_weights(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    optional: Sequence[str] = ("backbone.",),
) -> LoadReport:
    """Load what a ViSFT run trained (`MODEL.WEIGHTS`, `--weights`) into a whole model.

    Args:
        model: a ViSFT model (`backbone`, `heads`).
        path: a run's OUTPUT_DIR, a stage's folder, or a file (see `run_files`).
        optional: prefixes of model names that the run may lack, such as LoRA before it was trained. Weights of the
            base are never expected. If heads are optional, they are not searched beside a stage's folder.

    Raises:
        CheckpointError: there is no whole checkpoint, or it does not fit the model or its base.
    """
    tensors: dict[str, Tensor] = {}
    paths = run_files(path, earlier="heads." not in optional)
    for file in paths:
        check_base(file, getattr(model.backbone, "base", None))
        if getattr(model.backbone, "lora_config", None) is not None:
            _check_lora(file, model.backbone)
        tensors.update(read_tensors(file))
    wanted = [n for n in model.state_dict() if n.startswith("heads.") or _is_lora(n)]
    names = [n for n in wanted if n in tensors or not n.startswith(tuple(optional))]
    report = load_into(
        model,
        tensors,
        what=" + ".join(str(file) for file in paths),
        names=names,
        hint="Use the config that the run was started with.",
    )
    left = [n for n in wanted if n not in tensors]
    if left:
        logger.info("%s: not in the run, left as they are: %d tensors%s", path, len(left), groups(left))
    return report


def load_tower(backbone: nn.Module, path: str | os.PathLike) -> LoadReport:
    """Load the tower's tensors of a run or a LoRA file. Heads are ignored.

    Args:
        backbone: a CLIPViT, with unmerged LoRA if the file holds LoRA.
        path: a run's folder, a stage's folder, or a file with LoRA or a whole model, ours or the authors'.

    Raises:
        CheckpointError: there are no tensors of a tower, or they do not fit this one.
    """
    paths = run_files(path, earlier=False)
    tensors: dict[str, Tensor] = {}
    for file in paths:
        check_base(file, backbone.base)
        _check_lora(file, backbone)
        tensors.update(tower_tensors(read_tensors(file), backbone))
    what = " + ".join(str(file) for file in paths)
    expected = [name for name in backbone.state_dict() if _is_lora(name) or name in tensors]
    if not any(name.startswith("tower.") for name in tensors):
        raise CheckpointError(
            f"{what}: holds nothing of a tower (neither LoRA nor trained weights); give a run whose stage `lora` has a "
            "checkpoint, or a LoRA file."
        )
    return load_into(
        backbone,
        tensors,
        what=what,
        names=expected,
        ignore={"heads.": "heads are no part of the tower", "other.": "not of the tower"},
        hint="Use the MODEL.CLIP_VIT and MODEL.LORA settings that it was trained with.",
    )


def tower_tensors(tensors: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return a file's tensors by a CLIPViT's names (`tower.`...), and the others under `heads.` or `other.`.

    The authors' LoRA has the factor 1 / rank. It is scaled to the backbone's alpha / rank.
    """
    if authors.is_lora_file(tensors):
        trunk = "tower.trunk." if hasattr(backbone.tower, "trunk") else "tower."
        alpha = backbone.lora_config.alpha if backbone.lora_config else 1.0
        renamed = {}
        for (block, target), (a, b) in authors.split_lora(tensors).items():
            place = f"{trunk}blocks.{block}.lora.{target}."
            renamed |= {f"{place}lora_A": a, f"{place}lora_B": b if alpha == 1 else b / alpha}
        return renamed
    renamed = {}
    for name, tensor in tensors.items():
        before, tower, inner = name.partition("tower.")
        if name.startswith(("heads.", authors.HEAD_PREFIX)):
            renamed["heads." + name.removeprefix("heads.")] = tensor
        elif tower and (not before or before.endswith(".")):
            renamed[tower + inner] = tensor
        else:
            renamed["other." + name] = tensor
    return renamed


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _check_lora(path: Path, backbone: nn.Module) -> None:
    """Alpha does not show in shapes, so the value in the file's header is compared."""
    named, config = (describe(path).get("settings") or {}).get("lora"), backbone.lora_config
    if named and config and (named["rank"], named["alpha"]) != (config.rank, config.alpha):
        raise CheckpointError(
            f"{path}: LoRA was trained with rank {named['rank']} and alpha {named['alpha']}, the config says "
            f"{config.rank} and {config.alpha}; set MODEL.LORA.RANK and MODEL.LORA.ALPHA to the file's."
        )


def check_file(
    path: str | os.PathLike,
    *,
    key: str,
    architecture: str | None = None,
    sha256: str | None = None,
    heads_only: bool = False,
) -> list[Path]:
    """Check a weight file or a run's folder before any model is built. No value is read.

    It must exist, be whole, contain no pickled code, hold tensors of ours or the authors', and belong to this tower.

    Args:
        key: the config key or argument with its path, for the message.
        architecture: `MODEL.CLIP_VIT.NAME`.
        sha256: of the base's weight file, if known.
        heads_only: for `MODEL.VISFT.HEAD_FILES`. It must hold heads; another base of the same architecture is allowed.

    Returns:
        The files that will be read.

    Raises:
        CheckpointError: one of these does not hold.
    """
    try:
        files = [head_file(path)] if heads_only else run_files(path)
        for file in files:
            shapes = read_shapes(file)
            _check_described_base(file, architecture, None if heads_only else sha256)
            if heads_only:
                split_heads(shapes, file)
            elif not authors.is_head_file(shapes) and not any(
                name.startswith("heads.") or "lora_" in name or "tower." in name for name in shapes
            ):
                raise CheckpointError(
                    f"{file}: holds nothing that a run trains (names like {some(list(shapes), limit=2)}); "
                    f"a CLIP's "
                    "own weights go to MODEL.CLIP_VIT.PRETRAINED."
                )
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    return files


def check_base(path: str | os.PathLike, base: Any) -> None:
    """Compare the base in a checkpoint's header with a model's (`BaseTower`; None: nothing is compared).

    Raises:
        CheckpointError: another architecture, or other weights.
    """
    if base is not None:
        _check_described_base(Path(path), base.name, base.sha256)


def _check_described_base(path: Path, architecture: str | None, sha256: str | None) -> None:
    named = describe(path).get("base") or {}
    if architecture and named.get("name") and named["name"] != architecture:
        raise CheckpointError(
            f"{path}: was trained on the tower {named['name']}, the config names {architecture}; set "
            f"MODEL.CLIP_VIT.NAME {named['name']}, or give another file."
        )
    if sha256 and named.get("sha256") and named["sha256"] != sha256:
        raise CheckpointError(
            f"{path}: was trained on other base weights ({named.get('pretrained') or 'a file'}, SHA-256 "
            f"{named['sha256'][:12]}...) than the config's ({sha256[:12]}...); set "
            f"MODEL.CLIP_VIT.PRETRAINED to them."
        )
