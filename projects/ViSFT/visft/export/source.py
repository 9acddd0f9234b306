"""What every export starts from: the tuned tower's tensors in float32, the base, and the preprocessing of images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visft.checkpoint.files import Lazy
from visft.errors import ExportError
from visft.export import base_clip as bases
from visft.export import verification
from visft.modeling.backbone import CLIPViT, frozen_weights, lora


@dataclass
class Source:
    """A tower to be exported.

    Attributes:
        model: the CLIPViT. It is not changed.
        clip: the whole base. None: the format needs only the tower.
        visual: a module whose forward pass computes the embedding from `state`: the base's tower, or the model's.
        name, config: of the base's architecture in open_clip. None: unknown.
        interpolate: 1: the tuned weights, 0: the base's.
        preprocess: `size` `[h, w]`, `mean`, `std`, `interpolation`, `resize_mode` of images, in open_clip's terms.
        state: the tower's tensors with LoRA merged, by open_clip's names below `visual.`.
        outside: tensors of the whole base outside the tower.
    """

    model: CLIPViT
    clip: nn.Module | None
    visual: nn.Module
    name: str | None
    config: dict[str, Any] | None
    interpolate: float
    preprocess: dict[str, Any]
    state: dict[str, Tensor | Lazy] = field(default_factory=dict, repr=False)
    outside: dict[str, Tensor | Lazy] = field(default_factory=dict, repr=False)

    def embed(self, pictures: Tensor) -> Tensor:
        """The embedding that a reader must find: that of the model itself, with its LoRA merged or not.

        For a mixture with the base, or if the model holds 16-bit weights, it is computed from `state` by the tower's
        own forward pass. In the second case it is first compared with the model's.

        Raises:
            ExportError: the model, in its lower precision, computes another embedding.
        """
        low = bool(self.model.frozen_dtype)
        if self.interpolate == 1 and not low:
            return verification.embed(self.model, pictures)
        found = verification.embed_state(self.visual, pictures, self.state)
        if self.interpolate == 1:
            expected = verification.embed(self.model, pictures)
            verification.compare("images", found, expected, verification.LOW_PRECISION_TOLERANCE)
        return found


def resolve(
    model: CLIPViT,
    base: nn.Module | str | os.PathLike | None,
    interpolate: float,
    *,
    whole: bool,
) -> Source:
    """Collect what an export needs.

    Args:
        base: as in `base_clip.whole_clip`.
        whole: whether the format holds more than the tower. If not, the base is built only if its weights are needed.

    Raises:
        ExportError: a needed base is missing or of another architecture, or `interpolate` is outside 0 to 1.
    """
    if not 0 <= interpolate <= 1:
        raise ExportError(
            f"interpolate is {interpolate:g}; expected 0 (the base) to 1 (the tuned tower), or between."
        )
    remembered = model.base is not None
    needed = whole or (remembered and (interpolate != 1 or model.frozen_dtype))
    clip, config = None, None
    name = model.base.name if remembered else None
    if base is not None or needed:
        clip, name, config = bases.whole_clip(model, base)
    visual = model.tower if clip is None else clip.visual
    untuned = visual is model.tower and not lora.has_lora(model)
    if interpolate != 1 and untuned and (model.train_mode == "full" or not remembered):
        raise ExportError(
            "The base's weights are gone: the model holds the tuned ones alone. Pass base= to mix them."
        )
    source = Source(model, clip, visual, name, config, interpolate, _preprocess(model, visual))
    source.state = _state(model, visual, interpolate)
    if clip is not None:
        source.outside = {n: t for n, t in clip.state_dict().items() if not n.startswith("visual.")}
    return source


def untouched(model: CLIPViT, interpolate: float) -> Source:
    """Return a source without tensors, for descriptions of the tower."""
    name = model.base.name if model.base is not None else None
    preprocess = _preprocess(model, model.tower)
    return Source(model, None, model.tower, name, None, interpolate, preprocess)


def _state(model: CLIPViT, visual: nn.Module, interpolate: float) -> dict[str, Tensor]:
    below = {name: tensor for name, tensor in visual.state_dict().items() if not bases.is_adapter(name)}
    own = [name for name in model.tower.state_dict() if not bases.is_adapter(name)]
    # A bare timm tower is open_clip's `visual.trunk`.
    prefix = "" if set(own) == set(below) else "trunk."
    theirs = {name for name in below if name.startswith(prefix)}
    odd = sorted({prefix + name for name in own} ^ theirs)
    if odd:
        raise ExportError(
            f"The base is another architecture than the model's tower: {len(odd)} tensors are in one of them alone "
            f"({', '.join(odd[:3])}); give the CLIP that the tower came from."
        )
    for name, tensor in tuned(model, {name: below[prefix + name] for name in own}, interpolate):
        below[prefix + name] = tensor
    return {name: tensor.detach().cpu() for name, tensor in below.items()}


def tuned(model: CLIPViT, base: dict[str, Tensor], interpolate: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the tower's tensors by name, with LoRA merged and mixed with the base's (arXiv:2109.01903).

    A weight that the model stores in lower precision (`FROZEN_DTYPE`) is taken from the base, to which LoRA's update is
    added in float32.

    Args:
        base: the base's tensors under the same names.

    Raises:
        ExportError: a shape differs.
    """
    sites: dict[str, list[lora.Site]] = {}
    for site in lora.sites(model):
        sites.setdefault(site.weight_name.removeprefix("tower."), []).append(site)
    merged = lora.is_merged(model)
    for name, tensor in model.tower.state_dict().items():
        if bases.is_adapter(name):
            continue
        shared = base[name].data_ptr() == tensor.data_ptr()
        reference, value = base[name].detach().cpu(), tensor.detach().cpu()
        if reference.shape != value.shape:
            raise ExportError(
                f"visual.{name} has shape {list(value.shape)}, the base's {list(reference.shape)}; give the CLIP that "
                "the tower came from."
            )
        if merged and name in sites:
            value = value.clone()
            for site in sites[name]:
                value[site.projection.start : site.projection.stop] = site.adapter.base.cpu()
        if frozen_weights.holds(value, reference):
            value = reference
        if frozen_weights.is_int8(value):
            value = value.dequantize()
        if value.is_floating_point():
            value = value.float().clone()
            if interpolate != 1 and not shared:
                value = torch.lerp(reference.float(), value, interpolate)
        for site in sites.get(name, ()):
            rows = value[site.projection.start : site.projection.stop]
            rows += interpolate * site.adapter.delta().cpu()
        yield name, value


def _preprocess(model: CLIPViT, visual: nn.Module) -> dict[str, Any]:
    known = dict(getattr(visual, "preprocess_cfg", None) or {})
    found = {
        "size": list(model.image_size),
        "mean": list(known.get("mean") or model.mean),
        "std": list(known.get("std") or model.std),
        "interpolation": known.get("interpolation") or "bicubic",
        "resize_mode": known.get("resize_mode") or "shortest",
    }
    if found["resize_mode"] == "shortest" and found["size"][0] != found["size"][1]:
        found["interpolation"] = "bicubic"  # as open_clip does
    for part in ("mean", "std"):
        if found[part] != list(getattr(model, part)):
            raise ExportError(
                f"The base's images have {part} {found[part]}, the model's {list(getattr(model, part))}; give the "
                "CLIP that the tower came from."
            )
    return found
