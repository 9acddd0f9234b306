"""Names in a base's weight file (open_clip's, EVA-CLIP's, a bare tower's) to open_clip's names."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from visft.errors import CheckpointError

OPEN_CLIP, EVA_CLIP, BARE = "open_clip", "EVA-CLIP", "bare tower"

# Below the tower, where EVA-CLIP's names differ from timm's, which open_clip takes the tower from.
_INNER = (
    (re.compile(r"\.mlp\.w1\."), ".mlp.fc1_g."),
    (re.compile(r"\.mlp\.w2\."), ".mlp.fc1_x."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
    (re.compile(r"\.mlp\.ffn_ln\."), ".mlp.norm."),
    (re.compile(r"\.attn\.inner_attn_ln\."), ".attn.norm."),
)
_SPLIT_BIASES = re.compile(r"\.attn\.([qv])_bias$")
_TEXT = re.compile(r"(token_embedding\.|positional_embedding$|transformer\.|ln_final\.|text_projection)")
_COMPUTED = re.compile(r"(^|\.)(rope\.|attn_mask$|position_ids$|relative_position_index$)")
_OUTSIDE_BLOCKS = ("cls_token", "pos_embed", "patch_embed.", "norm.", "fc_norm.", "head.", "rope.")


@dataclass(frozen=True)
class BaseNames:
    """What the tensors of a base's file are.

    Attributes:
        kind: whose names they are: `OPEN_CLIP`, `EVA_CLIP` or `BARE`, a tower without a text tower.
        sources: the file's names by open_clip's.
        ignored: names that open_clip computes itself, and why.
    """

    kind: str
    sources: dict[str, str]
    ignored: dict[str, str]


def kind_of(names: Iterable[str]) -> str | None:
    """Whose names they are; None: nobody's that is known here."""
    names = list(names)
    if any(name.startswith(("visual.trunk.", "visual.transformer.", "visual.conv1.")) for name in names):
        return OPEN_CLIP
    if any(name.startswith("visual.blocks.") for name in names):
        return EVA_CLIP
    return BARE if any(name.startswith("blocks.") for name in names) else None


def to_open_clip(names: Collection[str], expected: Collection[str], what: str) -> BaseNames:
    """Find open_clip's name for every name of a base's file.

    Args:
        names: in the file.
        expected: all names of open_clip's model; they decide where the text tower lies.
        what: the file, for messages.

    Raises:
        CheckpointError: no tower is in the file, or two of its names become the same.
    """
    kind = kind_of(names)
    if kind is None:
        raise CheckpointError(
            f"{what}: holds no vision tower that is known here (names like {', '.join(sorted(names)[:2])}); expected "
            "names beginning with `visual.` (open_clip's or EVA-CLIP's), or `blocks.` (a bare tower)."
        )
    text_apart = any(name.startswith("text.") for name in expected)
    separate = any(".attn.q_proj." in name for name in names)
    sources: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for name in names:
        if _COMPUTED.search(name) and name not in expected:
            ignored[name] = "open_clip computes it"
            continue
        target = name
        if kind == EVA_CLIP and name.startswith("visual."):
            target = "visual.trunk." + _inner(name.removeprefix("visual."), separate)
        elif kind == BARE and name.startswith(("blocks.", *_OUTSIDE_BLOCKS)):
            target = "visual.trunk." + _inner(name, separate)
        if text_apart and _TEXT.match(target):
            target = "text." + target
        if target in sources:
            raise CheckpointError(
                f"{what}: {name} and {sources[target]} would both be {target}; it mixes two layouts."
            )
        sources[target] = name
    return BaseNames(kind, sources, ignored)


def _inner(name: str, separate: bool) -> str:
    for pattern, new in _INNER:
        name = pattern.sub(new, name)
    return _SPLIT_BIASES.sub(r".attn.\1_proj.bias", name) if separate else name


def check(
    base: BaseNames,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    architecture: str,
    optional: Collection[str] = (),
) -> None:
    """Compare a base with an architecture, all names and shapes.

    Args:
        found: shapes by the file's names.
        expected: shapes by open_clip's names.
        optional: open_clip's names that may be missing.

    Raises:
        CheckpointError: a tensor has another shape, is missing, or has no place; the message names it.
    """
    hint = f"give the weights of {architecture}, or name the base's architecture in MODEL.CLIP_VIT.NAME."
    # The tower before the text tower, in the architecture's order.
    for target in sorted(expected, key=lambda name: not name.startswith("visual.")):
        source = base.sources.get(target)
        if source is not None and not _alike(found[source], expected[target]):
            raise CheckpointError(
                f"{what}: {source} has shape {list(found[source])}, {architecture} has {list(expected[target])}; {hint}"
            )
    extra = sorted(set(base.sources) - set(expected))
    missing = [name for name in expected if name not in base.sources and name not in optional]
    if missing:
        raise CheckpointError(
            f"{what}: lacks {len(missing)} of the tensors of {architecture} ({', '.join(missing[:3])}); {hint}"
        )
    if extra:
        names = ", ".join(base.sources[name] for name in extra[:3])
        raise CheckpointError(
            f"{what}: has {len(extra)} tensors that {architecture} has no place for ({names}); {hint}"
        )


def _alike(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    # A scale is stored with and without a dimension.
    return left == right or {left, right} == {(), (1,)}
