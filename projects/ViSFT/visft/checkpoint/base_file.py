"""Converts foreign weight files of a base to what open_clip reads: names, layout and sizes.

Files that open_clip reads itself are left to it.
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
    """Return a file's tensors as open_clip reads them. Unchanged tensors are the same objects.

    Besides the wrappings of `files.read_tensors`, it handles any prefix of all names, such as `model.` or
    `module.backbone.`; the names of a CLIP in transformers; and position embeddings of another image size. open_clip
    resamples those in the file's type, even in half precision, and those of timm's towers not at all.

    Args:
        tensors: of the file.
        expected: the model's tensors by name, like its `state_dict`.
        path: the file.

    Raises:
        CheckpointError: the file holds several models, or only part of one.
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
    """Return the prefix of the model's names in a file; "": none.

    It is the prefix of most names of the model, or of a CLIP in transformers.

    Raises:
        CheckpointError: the file holds the model twice, under two prefixes.
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
    """Return the number of tokens before the patches, if position embeddings `[.., n, C]` differ only in the side of a
    square grid. None: they are equal, or differ in another way."""
    if len(old) != len(new) or old[-1] != new[-1] or old[-2] == new[-2]:
        return None
    return next(
        (k for k in (1, 0) if all(math.isqrt(n - k) ** 2 == n - k > 0 for n in (old[-2], new[-2]))), None
    )


def _resized_positions(embedding: Tensor, shape: Sequence[int], extra: int) -> Tensor:
    """Resample position embeddings to another number of patches in float32, like open_clip and timm."""
    from timm.layers import resample_abs_pos_embed

    side, table = math.isqrt(shape[-2] - extra), embedding.float().reshape(1, *embedding.shape[-2:])
    return resample_abs_pos_embed(table, [side, side], num_prefix_tokens=extra).reshape(tuple(shape))


def misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describe how tensors that open_clip could not load differ from the model. "": not in names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not any(name.startswith("visual.") for name in found):
        return (
            f"it has no names of a vision tower, `visual.` (its own are like {', '.join(sorted(found)[:2])})"
        )
    # In older files, names of the text encoder have no prefix `text.`.
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
    """Refuse weights that are not finite. Tensors on `meta` have no values.

    Raises:
        CheckpointError: names the first tensor with NaN or infinity.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # If a tensor has NaN, both are NaN. Nothing as large as the tensor is allocated.
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
            bad = tensor[~torch.isfinite(tensor)]
            raise CheckpointError(
                f"{path}: {name} has {len(bad)} of {tensor.numel()} values that are NaN or infinite; fetch or save the "
                "weights again."
            )
