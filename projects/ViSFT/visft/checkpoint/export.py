"""A tuned tower written for others: the complete CLIP for open_clip, and LoRA alone.

Every export is written aside, reopened by its reader in a fresh process and compared, and only then takes its
place.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import CLIPViT, open_clip_zoo
from ..backbone import lora as adapters
from ..errors import CheckpointError, ExportError
from . import authors, export_check
from .files import PARTIAL_SUFFIX, read_json, sync_folder, write_aside, write_safetensors
from .run import describe_base

logger = logging.getLogger(__name__)

CONFIG_NAME = "open_clip_config.json"
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


def open_clip(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
) -> Path:
    """Write the complete CLIP, its vision tower tuned, as one safetensors file that open_clip loads by its
    path.

    `open_clip_config.json` is written beside it, so that `open_clip.create_model("local-dir:FOLDER")` needs
    no name. The text tower and all else is the base's. Patch and position embedding have the base's shapes:
    resampling to other strides and sizes happens in a CLIPViT's forward and is no part of its weights.

    Args:
        model: with LoRA, merged or not, or without. It is left as it is.
        path: ends in `.safetensors`. What is there is replaced after the check alone.
        base: the whole CLIP: an open_clip model, a file, or a tag. None: what `from_open_clip` remembers.
        interpolate: 1 is the tuned tower, 0 the base's, in between a mixture of the weights
            (arXiv:2109.01903).

    Returns:
        The path.

    Raises:
        ExportError: no base; the base is of another architecture; open_clip, in a process of its own, does
            not load the file or computes other embeddings than the model.
    """
    path = _output(path, ".safetensors")
    clip, config = _whole_clip(model, base)
    _refuse_other_config(path.parent / CONFIG_NAME, config)
    state = clip_state(model, clip, interpolate)
    with _aside(path) as folder:
        write_safetensors(folder / path.name, state, {"format": "pt"})
        text = json.dumps({"model_cfg": config, "preprocess_cfg": _preprocess(clip)}, indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        export_check.stored(folder / path.name, state)
        export_check.open_clip(folder, model, clip, state, tuned=interpolate == 1)
        _move(folder / path.name, path)
        _move(folder / CONFIG_NAME, path.parent / CONFIG_NAME)
    others = sorted(file.name for file in path.parent.glob("*.safetensors") if file != path)
    if others:
        logger.info("%s has other weights beside it (%s): load it by its path", path, ", ".join(others[:3]))
    logger.info("wrote %s: open_clip loads it in a process of its own and gives the same embeddings", path)
    return path


def clip_state(model: CLIPViT, clip: nn.Module, interpolate: float = 1.0) -> dict[str, Tensor]:
    """All tensors of a CLIP under open_clip's names, with the tower's from `model`, LoRA in its weights.

    A weight that the model stores in lower precision (`FROZEN_DTYPE`) is taken from the base, to which LoRA's
    update is added in float32.

    Raises:
        ExportError: the towers differ in names or shapes.
    """
    state = {name: tensor for name, tensor in clip.state_dict().items() if not _is_adapter(name)}
    below = {n.removeprefix("visual."): tensor for n, tensor in state.items() if n.startswith("visual.")}
    own = [name for name in model.tower.state_dict() if not _is_adapter(name)]
    # A bare timm tower is open_clip's `visual.trunk`.
    prefix = "" if set(own) == set(below) else "trunk."
    theirs = [name for name in below if name.startswith(prefix)]
    if {prefix + name for name in own} != set(theirs):
        odd = sorted({prefix + name for name in own} ^ set(theirs))
        raise ExportError(
            f"The base is another architecture than the model's tower: {len(odd)} tensors are in one of "
            f"them alone "
            f"({', '.join(odd[:3])}); give the CLIP that the tower came from."
        )
    for name, tensor in _tuned(model, {name: below[prefix + name] for name in own}, interpolate):
        state[f"visual.{prefix}{name}"] = tensor
    return state


def lora(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: Any = None,
    layout: str = "visft",
    interpolate: float = 1.0,
) -> Path:
    """Write LoRA alone.

    Args:
        model: with LoRA, merged or not. It is left as it is.
        path: `.safetensors`; for the authors' layout also `.pt`, which their code reads.
        base: not needed; accepted as by the other formats.
        layout: `visft`: our names, with rank, alpha and base in the header. `authors`: q and v of every block under
            the released files' names, scaled so that the factor 1 / rank of their code is right.
        interpolate: a factor on the update.

    Raises:
        ExportError: no LoRA; an unknown layout; a tower or targets that the layout has no place for.
    """
    path = _output(path, *((".pt", ".safetensors") if layout == "authors" else (".safetensors",)))
    if not adapters.has_lora(model):
        raise ExportError(f"{path}: there is no LoRA in the model to be written; export another format.")
    if layout == "visft":
        tensors = {f"backbone.{name}": tensor for name, tensor in adapters.state_dict(model).items()}
        tensors = {n: t.detach() * (interpolate if n.endswith("lora_B") else 1) for n, t in tensors.items()}
    elif layout == "authors":
        tensors = _authors_lora(model, path, interpolate)
    else:
        raise ExportError(f"{path}: there is no LoRA layout `{layout}`; choose `visft` or `authors`.")
    config = model.lora_config
    about = {
        "stage": "lora",
        "base": describe_base(model.base),
        "settings": {
            "lora": {
                "rank": config.rank,
                "alpha": config.alpha,
                "targets": list(config.targets),
                "last_blocks": config.last_blocks,
            }
        },
    }
    if path.suffix == ".pt":
        with write_aside(path) as partial:
            torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, partial)
            export_check.stored(partial, tensors)
    else:
        with _aside(path) as folder:
            metadata = {"format": "pt", **({"visft": json.dumps(about)} if layout == "visft" else {})}
            write_safetensors(folder / path.name, tensors, metadata)
            export_check.stored(folder / path.name, tensors)
            _move(folder / path.name, path)
    logger.info("wrote %s: LoRA alone, %d tensors in the layout `%s`", path, len(tensors), layout)
    return path


@dataclass(frozen=True)
class Format:
    """What writes a format, what a run calls its file, and how such files' names may end."""

    write: Callable[..., Path]
    file_name: str
    suffixes: tuple[str, ...] = (".safetensors",)


FORMATS = {
    "open_clip": Format(open_clip, "visft_backbone.safetensors"),
    "lora": Format(lora, "visft_lora.safetensors"),
    "authors": Format(
        functools.partial(lora, layout="authors"), "visft_lora_authors.pt", (".pt", ".safetensors")
    ),
}
"""The formats of `VISFT.EXPORT` and `--format`."""


def _authors_lora(model: CLIPViT, path: Path, interpolate: float) -> dict[str, Tensor]:
    config = model.lora_config
    fused = all(getattr(block.attn, "qkv", None) is not None for block in model.blocks)
    if set(config.targets) != {"q", "v"} or not fused:
        raise ExportError(
            f"{path}: the authors' layout holds q and v of fused qkv projections as EVA-g and EVA-E have; the model "
            f"has LoRA on {', '.join(config.targets)} of {type(model.blocks[0].attn).__name__}: use the format `lora`."
        )
    pairs = {
        (site.block, site.projection.key): (
            site.adapter.lora_A.detach(),
            site.adapter.lora_B.detach() * interpolate,
        )
        for site in adapters.sites(model)
    }
    return authors.join_lora(pairs, config.rank, config.alpha, len(model.blocks), model.embed_dim)


def _tuned(model: CLIPViT, base: dict[str, Tensor], interpolate: float) -> Iterator[tuple[str, Tensor]]:
    """The tower's tensors by name, as `clip_state` describes, one at a time."""
    sites: dict[str, list[adapters.Site]] = {}
    for site in adapters.sites(model):
        sites.setdefault(site.weight_name.removeprefix("tower."), []).append(site)
    merged = adapters.is_merged(model)
    for name, tensor in model.tower.state_dict().items():
        if _is_adapter(name):
            continue
        reference, value = base[name].cpu(), tensor.detach().cpu()
        if reference.shape != value.shape:
            raise ExportError(
                f"visual.{name} has shape {list(value.shape)}, the base's {list(reference.shape)}; give "
                f"the CLIP that "
                "the tower came from."
            )
        if merged and name in sites:
            value = value.clone()
            for site in sites[name]:
                value[site.projection.start : site.projection.stop] = site.adapter.base.cpu()
        if value.dtype != reference.dtype and torch.equal(reference.to(value.dtype), value):
            value = reference
        if value.is_floating_point():
            value = value.float().clone()
            if interpolate != 1 and reference.data_ptr() != tensor.data_ptr():
                value = torch.lerp(reference.float(), value, interpolate)
        for site in sites.get(name, ()):
            rows = value[site.projection.start : site.projection.stop]
            rows += interpolate * site.adapter.delta().cpu()
        yield name, value


def _whole_clip(
    model: CLIPViT, base: nn.Module | str | os.PathLike | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The CLIP that the rest is copied from, and open_clip's description of its architecture."""
    name = model.base.name if model.base is not None else None
    if base is None:
        if name is None:
            raise ExportError(
                "The model is a bare tower and open_clip's format needs the whole CLIP; pass base=: an "
                "open_clip "
                "model, a weight file or a tag."
            )
        clip = model.base_clip()
    elif isinstance(base, nn.Module):
        if not hasattr(base, "visual"):
            raise ExportError(
                f"base is a {type(base).__name__} without `visual`; pass a whole open_clip model."
            )
        clip = base
        name = (
            name
            if name and _fits(name, clip)
            else next((n for n in _names(clip.visual) if _fits(n, clip)), None)
        )
    else:
        clip, name = _built(model, os.fspath(base), name)
    if name is None:
        raise ExportError(
            "The base is no architecture that open_clip knows by name; register it with "
            "open_clip.add_model_config."
        )
    return clip, open_clip_zoo.open_clip().get_model_config(name)


def _built(model: CLIPViT, base: str, name: str | None) -> tuple[nn.Module, str]:
    """A CLIP from a tag or file, of the model's architecture; where that is unknown, of one that has such a tower."""
    names = (
        [name]
        if name
        else [n for n in _names(model.tower) if _alike(open_clip_zoo.meta_tower(n), model.tower)]
    )
    faults = [f"no architecture of open_clip has this tower ({type(model.tower).__name__})"]
    for candidate in names:
        try:
            return open_clip_zoo.create_clip(candidate, base)[0], candidate
        except Exception as error:
            faults.append(str(error))
    raise ExportError(f"base `{base}`: {faults[-1]}")


def _names(tower: nn.Module) -> list[str]:
    """Architectures that may have this tower, by the sizes in their configuration: cheap to ask of all."""
    module, names = open_clip_zoo.open_clip(), []
    trunk = getattr(tower, "trunk", tower)
    timm_name = (getattr(trunk, "default_cfg", None) or {}).get("architecture")
    for name in module.list_models():
        vision = module.get_model_config(name)["vision_cfg"]
        if "timm_model_name" in vision:
            alike = vision["timm_model_name"].split(".")[0] == timm_name
        else:
            width, depth = vision.get("width", 768), vision.get("layers", 12)
            conv, blocks = getattr(tower, "conv1", None), getattr(tower, "transformer", None)
            alike = conv is not None and (width, depth) == (conv.out_channels, len(blocks.resblocks))
        if alike:
            names.append(name)
    return names


def _fits(name: str, clip: nn.Module) -> bool:
    """Whether an architecture is that of a CLIP, by its configuration and all names and shapes."""
    module = open_clip_zoo.open_clip()
    config = module.get_model_config(name)
    if config["embed_dim"] != _embed_dim(clip) or "hf_model_name" in config["text_cfg"]:
        return False
    if not _alike(open_clip_zoo.meta_tower(name), clip.visual):
        return False
    with torch.device("meta"):
        other = module.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    return type(other) is type(clip) and _shapes(other) == _shapes(clip) and _kinds(other) == _kinds(clip)


def _embed_dim(clip: nn.Module) -> int | None:
    projection = getattr(getattr(clip, "text", clip), "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return None if projection is None else projection.shape[1]


def _alike(left: nn.Module, right: nn.Module) -> bool:
    return _shapes(left) == _shapes(right) and _kinds(left) == _kinds(right)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in module.state_dict().items() if not _is_adapter(n)}


def _kinds(module: nn.Module) -> dict[str, Any]:
    """Classes and plain settings of all submodules: what shapes do not tell (activations, pooling, image size)."""
    plain = (bool, int, float, str, tuple, type(None))
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        if ".lora" not in f".{name}":
            settings = {k: v for k, v in vars(part).items() if isinstance(v, plain) and k[0] != "_"}
            for changing in ("training", "image_mean", "image_std", "output_dict"):
                settings.pop(changing, None)
            found[name] = (type(part).__name__, settings)
    return found


def _preprocess(clip: nn.Module) -> dict[str, Any]:
    config = dict(getattr(clip.visual, "preprocess_cfg", None) or {})
    config.setdefault("mean", getattr(clip.visual, "image_mean", None) or open_clip_zoo.OPENAI_MEAN)
    config.setdefault("std", getattr(clip.visual, "image_std", None) or open_clip_zoo.OPENAI_STD)
    return {key: config[key] for key in _PREPROCESS_KEYS if key in config}


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


# Files


def _output(path: str | os.PathLike, *suffixes: str) -> Path:
    path = Path(path)
    if path.suffix not in suffixes:
        raise ExportError(f"{path}: the name must end in {' or '.join(suffixes)}, as its readers expect.")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; give the name of a file.")
    return path


def _refuse_other_config(path: Path, config: dict[str, Any]) -> None:
    """The folder's `open_clip_config.json` speaks for all weights in it."""
    if path.exists():
        try:
            there = read_json(path).get("model_cfg")
        except (CheckpointError, AttributeError):
            there = None
        if there != json.loads(json.dumps(config)):
            raise ExportError(f"{path}: belongs to another architecture; write the export to another folder.")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` for writing and checking in; what earlier, killed exports left goes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    folder = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    sync_folder(target.parent)
