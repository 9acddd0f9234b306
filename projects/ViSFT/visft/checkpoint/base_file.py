"""Weight files of a base as they come from elsewhere, made what open_clip reads: names, layout and sizes.

What open_clip reads by itself is left to it.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from visft.checkpoint import hugging_face_base
from visft.errors import CheckpointError

logger = logging.getLogger(__name__)

_POSITIONS = ("visual.positional_embedding", "visual.trunk.pos_embed")


def for_open_clip(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str
) -> dict[str, Tensor]:
    """A file's tensors as open_clip reads them; those that need no change are the same ones.

    Seen through are, beside what training programs put around and in front of names (`files.read_tensors`): any prefix
    of all names, as `model.` or `module.backbone.`; transformers' names of a CLIP; position embeddings of another image
    size, which open_clip resamples in the file's type, half precision too, and timm's towers not at all.

    Args:
        tensors: of the file.
        expected: what the model has, by name, as its `state_dict`.
        path: the file.

    Raises:
        CheckpointError: the file holds several models, or a part of one.
    """
    said = []
    if prefix := common_prefix(tensors, expected, path):
        said.append(f"its names begin with `{prefix}`")
        outside = [name for name in tensors if not name.startswith(prefix)]
        if outside:
            said.append(f"{len(outside)} tensors that do not are ignored ({outside[0]}, ...)")
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if hugging_face_base.is_clip(tensors):
        told = (
            ""
            if hugging_face_base.config_of(Path(path))
            else ", and no config.json beside it tells its activation"
        )
        said.append(f"its names are those of transformers{told}")
        tensors = hugging_face_base.to_open_clip(tensors, Path(path))
    tensors = dict(tensors)
    for name in tensors:
        if name.endswith(("positional_embedding", "pos_embed")):  # what open_clip resamples itself, too
            tensors[name] = tensors[name].float()
    for name in _POSITIONS:
        if name in tensors and name in expected:
            old, new = tensors[name], expected[name].shape
            if (extra := prefix_tokens(old.shape, new)) is not None:
                tensors[name] = _resized_positions(old, new, extra)
                said.append(f"{name} is resampled from {list(old.shape)} to {list(new)}")
    if said:
        logger.info("%s: %s", path, "; ".join(said))
    return tensors


def common_prefix(names: Collection[str], expected: Collection[str], path: str) -> str:
    """What stands in front of the model's names in a file; "": nothing.

    It is found by the names: the one in front of most of the names of the model, or of a CLIP of transformers.

    Raises:
        CheckpointError: the model is there twice, under two prefixes.
    """
    known = {*expected, *(name.removeprefix("text.") for name in expected)}
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts)):
            rest = ".".join(parts[cut:])
            if rest in known or rest.startswith(
                ("vision_model.encoder.layers.", "text_model.encoder.layers.")
            ):
                counts[".".join([*parts[:cut], ""]) if cut else ""] += 1
    ranked = counts.most_common(2)
    if not ranked:
        return ""
    best = ranked[0][0]
    # `text.` and `visual.` in front of names that the other tower has too are no second copy.
    second = next((other for other, count in ranked[1:] if 2 * count > ranked[0][1]), best)
    if not best.startswith(second) and not second.startswith(best):
        raise CheckpointError(
            f"{path}: holds the model twice, under `{best}` and `{second}`; save the one that is meant to a file of "
            "its own."
        )
    return min(best, second, key=len)


def prefix_tokens(old: Sequence[int], new: Sequence[int]) -> int | None:
    """How many tokens stand before the patches, where position embeddings `[.., n, C]` differ in the side of a square
    grid alone; None: they are equal, or differ otherwise."""
    if len(old) != len(new) or old[-1] != new[-1] or old[-2] == new[-2]:
        return None
    return next(
        (k for k in (1, 0) if all(math.isqrt(n - k) ** 2 == n - k > 0 for n in (old[-2], new[-2]))), None
    )


def _resized_positions(embedding: Tensor, shape: Sequence[int], extra: int) -> Tensor:
    """Position embeddings for another number of patches, by open_clip's and timm's resampling, in float32."""
    from timm.layers import resample_abs_pos_embed

    side, table = math.isqrt(shape[-2] - extra), embedding.float().reshape(1, *embedding.shape[-2:])
    return resample_abs_pos_embed(table, [side, side], num_prefix_tokens=extra).reshape(tuple(shape))


def misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """In what tensors that open_clip could not load differ from the model; "": not in names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not any(name.startswith("visual.") for name in found):
        return (
            f"it has no names of a vision tower, `visual.` (its own are like {', '.join(sorted(found)[:2])})"
        )
    # Of older files the names of the text tower have no `text.` in front.
    old = any(name.startswith("text.") for name in expected)
    known = {f"text.{name}" if old and name not in expected else name: found[name] for name in found}
    scales = ("logit_scale", "logit_bias")
    text = [name for name in expected if not name.startswith("visual.") and name not in scales]
    if text and not any(name in known for name in text):
        return "it has a vision tower alone, without the text tower"
    missing = [name for name in expected if name not in known and name not in scales]
    said = [
        f"{name} has shape {list(known[name])}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in known and tuple(known[name]) != tuple(tensor.shape) and name not in scales
    ]
    extra = [name for name in known if name not in expected]
    said += [f"it lacks {len(missing)} tensors ({missing[0]}, ...)"] if missing else []
    said += (
        [f"it has {len(extra)} tensors that the architecture has no place for ({extra[0]}, ...)"]
        if extra
        else []
    )
    return "; ".join(said[:3])


def require_finite(model: nn.Module, path: str) -> None:
    """Refuse weights that are not numbers. What is on `meta` has none.

    Raises:
        CheckpointError: names the first tensor with NaN or infinity.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # Of a tensor with NaN both are NaN; nothing as large as the tensor is made.
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
            bad = tensor[~torch.isfinite(tensor)]
            raise CheckpointError(
                f"{path}: {name} has {len(bad)} of {tensor.numel()} values that are NaN or infinite; fetch or save the "
                "weights again."
            )
