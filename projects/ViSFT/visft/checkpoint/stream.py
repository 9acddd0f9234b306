"""A base's weight file read a piece at a time: its tensors, their names in open_clip, and a CLIP built of them.

open_clip draws random weights, reads the whole file beside them and copies. That is twice the model, text tower
included, for which towers of billions of parameters leave no room.

A safetensors file is read a chunk at a time. A PyTorch file is memory-mapped, and mapped anew every so often, which
gives the pages that were touched back to the system. Processes of one machine share its cache of the file, so it is
read from the disk once for all of them.
"""

import contextlib
import copy
import importlib
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visft.checkpoint.files import Lazy, local_path, map_tensors, safetensors_starts
from visft.errors import CheckpointError

CHUNK = 8 << 20
"""Bytes that are read of a tensor at a time."""

REMAP = 32 << 20
"""Bytes read of a mapped file after which it is mapped anew."""


class TensorFile:
    """Tensors of a safetensors or PyTorch file by name, read when asked for.

    What is older than PyTorch's zip archives cannot be mapped and lies in memory as a whole.

    Attributes:
        path: the file.
        mapped: its tensors, memory-mapped; other ones after each mapping.

    Raises:
        CheckpointError: as `files.read_tensors`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.mapped: dict[str, Tensor] = map_tensors(path)
        self._starts = safetensors_starts(path)
        # One for all parts: memory for each, freed between other objects, would stay in pieces.
        self._buffer = torch.empty(CHUNK if self._starts else 0, dtype=torch.uint8)
        self._touched = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return {name: tuple(tensor.shape) for name, tensor in self.mapped.items()}

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor's values in order, row by row: flat, about `CHUNK` bytes at a time.

        A part is there until the next one of the file is asked for.
        """
        if name in self._starts:
            yield from self._read(name)
            return
        size, step = self.mapped[name].numel(), max(1, CHUNK // self.mapped[name].itemsize)
        for start in range(0, size, step):
            if self._touched > REMAP:
                self.mapped.clear()  # before the new mapping, so that never two are there
                self.mapped, self._touched = map_tensors(self.path, quiet=True), 0
            # A transposed or cut-out view is copied, which is rare in weight files.
            self.mapped[name] = self.mapped[name].contiguous()
            part = self.mapped[name].detach().view(-1)[start : start + step]
            self._touched += part.nbytes
            yield part
            del part

    def _read(self, name: str) -> Iterator[Tensor]:
        tensor, place = self.mapped[name], self._starts[name]
        end, step = place + tensor.nbytes, CHUNK // tensor.itemsize * tensor.itemsize
        while place < end:
            part = self._buffer[: min(step, end - place)]
            with open(
                local_path(self.path), "rb"
            ) as file:  # by itself for each part: a consumer may stop at any
                file.seek(place)
                if file.readinto(part.numpy()) < len(part):
                    raise CheckpointError(
                        f"{self.path}: was cut off while it was read; fetch or write it again."
                    )
            place += len(part)
            yield part.view(tensor.dtype)

    def lazy(self, name: str, shape: tuple[int, ...]) -> Lazy:
        """A tensor as it is written to another file; `shape` has as many elements."""
        return Lazy(self.mapped[name].dtype, tuple(shape), lambda: self.parts(name))

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Fill `out`, of as many elements and any type and device, with a tensor's values; returns `out`."""
        flat, start = out.view(-1), 0
        for part in self.parts(name):
            flat[start : start + len(part)].copy_(part)
            start += len(part)
            del part
        return out


# Names

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


def kind_of(names: Iterable[str]) -> str | None:
    """Whose names they are; None: nobody's that is known here."""
    names = list(names)
    if any(name.startswith(("visual.trunk.", "visual.transformer.", "visual.conv1.")) for name in names):
        return OPEN_CLIP
    if any(name.startswith("visual.blocks.") for name in names):
        return EVA_CLIP
    return BARE if any(name.startswith("blocks.") for name in names) else None


def to_open_clip(names: Collection[str], expected: Collection[str], what: str) -> dict[str, str]:
    """The names of a base's file by open_clip's names, without those that open_clip computes itself.

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
    for name in names:
        if _COMPUTED.search(name) and name not in expected:
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
    return sources


def _inner(name: str, separate: bool) -> str:
    for pattern, new in _INNER:
        name = pattern.sub(new, name)
    return _SPLIT_BIASES.sub(r".attn.\1_proj.bias", name) if separate else name


def check_names(
    sources: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    architecture: str,
    optional: Collection[str] = (),
) -> None:
    """Compare a base with an architecture, all names and shapes.

    Args:
        sources: as `to_open_clip` gives them.
        found: shapes by the file's names.
        expected: shapes by open_clip's names.
        optional: open_clip's names that may be missing.

    Raises:
        CheckpointError: a tensor has another shape, is missing, or has no place; the message names it.
    """
    hint = f"give the weights of {architecture}, or name the base's architecture in MODEL.CLIP_VIT.NAME."
    # The tower before the text tower, in the architecture's order.
    for target in sorted(expected, key=lambda name: not name.startswith("visual.")):
        source = sources.get(target)
        if source is not None and not _alike(found[source], expected[target]):
            raise CheckpointError(
                f"{what}: {source} has shape {list(found[source])}, {architecture} has {list(expected[target])}; {hint}"
            )
    extra = sorted(set(sources) - set(expected))
    missing = [name for name in expected if name not in sources and name not in optional]
    if missing:
        raise CheckpointError(
            f"{what}: lacks {len(missing)} of the tensors of {architecture} ({', '.join(missing[:3])}); {hint}"
        )
    if extra:
        names = ", ".join(sources[name] for name in extra[:3])
        raise CheckpointError(
            f"{what}: has {len(extra)} tensors that {architecture} has no place for ({names}); {hint}"
        )


def _alike(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    # A scale is stored with and without a dimension.
    return left == right or {left, right} == {(), (1,)}


# A CLIP


def build(described: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A CLIP whose parameters are on `meta` and whose buffers, rotary tables and masks among them, are real.

    torch's generator is left as open_clip's own construction leaves it: what is drawn afterwards (fresh heads, LoRA)
    is the same whether weights are drawn or streamed.

    Args:
        described: the same CLIP with all on `meta`, as open_clip makes it: its class and preprocessing.
        config: open_clip's description of the architecture.
    """
    config = copy.deepcopy(dict(config))
    config.pop("custom_text", None)
    for part, flag in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if flag.replace("pretrained", "name") in config[part]:
            config[part][flag] = False
    with _parameters_on_meta(), _Draws():
        clip = type(described)(**config)
    preprocess = described.visual.preprocess_cfg
    importlib.import_module("open_clip.model").set_model_preprocess_cfg(clip, preprocess)
    return clip.eval()


def load(
    clip: nn.Module,
    path: str | os.PathLike,
    name: str,
    *,
    seen: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    wanted: Callable[[str], bool] = lambda name: True,
    device: torch.device | str = "cpu",
) -> None:
    """Give a CLIP of `build` the weights of a file, one at a time.

    The whole file is compared with the whole model, by names and shapes; values are read of the wanted parameters
    alone. Their types are the model's.

    Args:
        path: a complete CLIP under open_clip's or EVA-CLIP's names, or another's that open_clip converts; safetensors
            or PyTorch's.
        name: of the architecture, for messages.
        seen: makes of the file's tensors what open_clip reads; not asked about EVA-CLIP's.
        wanted: whether a parameter is to be loaded; the others stay on `meta`.
        device: where the loaded parameters go.

    Raises:
        CheckpointError: the file is broken, or of EVA-CLIP and does not fit.
        RuntimeError: the file does not fit; open_clip's own.
    """
    made: dict[int, nn.Parameter] = {}
    file = TensorFile(path)
    eva_clip = kind_of(file.mapped) == EVA_CLIP
    sources = _by_name(clip, file, name) if eva_clip else _by_open_clip(clip, file, seen)
    for target, source in sources.items():
        owner, _, leaf = target.rpartition(".")
        module = clip.get_submodule(owner)
        old = module._parameters.get(leaf)
        if not wanted(target) or leaf not in {**module._parameters, **module._buffers}:
            continue
        if old is not None and id(old) in made:  # one parameter under two names
            module._parameters[leaf] = made[id(old)]
            continue
        if old is None:
            value = module._buffers[leaf]
        else:
            value = torch.empty(old.shape, dtype=old.dtype, device=device)
            module._parameters[leaf] = made[id(old)] = nn.Parameter(value, old.requires_grad)
        if isinstance(source, str):
            file.read_into(source, value)
        else:
            value.copy_(source.reshape(value.shape))


def _by_name(clip: nn.Module, file: TensorFile, name: str) -> dict[str, str]:
    """The file's names by the model's, of EVA-CLIP's files, which open_clip does not load."""
    expected = {n: tuple(t.shape) for n, t in clip.state_dict().items()}
    sources = to_open_clip(file.mapped, expected, str(file.path))
    check_names(sources, file.shapes(), expected, str(file.path), name)
    return sources


def _by_open_clip(
    clip: nn.Module, file: TensorFile, seen: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, str | Tensor]:
    """By the model's names, the file's name of each tensor, or the tensor where open_clip makes another of it.

    open_clip loads the mapped tensors into the model: it converts names and resizes what it does, and complains where
    they do not fit. Of values, parameters on `meta` take none.
    """
    factory, found = importlib.import_module("open_clip.factory"), {}
    origin = {_place(tensor): source for source, tensor in file.mapped.items() if tensor.numel()}

    def note(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_) -> None:
        found.update((n, origin.get(_place(t), t)) for n, t in state.items())

    tensors = dict(seen(file.mapped))
    hook, reader = clip.register_load_state_dict_pre_hook(note), factory.load_state_dict
    factory.load_state_dict = lambda *_, **__: tensors
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model")
            factory.load_checkpoint(clip, str(file.path))
    finally:
        factory.load_state_dict = reader
        hook.remove()
    return found


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go to `meta` as modules take them; what is computed from none of them stays real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # else taken before: it is one for both names
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class _Draws(TorchDispatchMode):
    """Random numbers for tensors on `meta` are drawn all the same, and thrown away."""

    def __init__(self) -> None:
        super().__init__()
        # One for all: memory for each, freed between the model's own small objects, would stay in pieces.
        self._space = torch.empty(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and getattr(args[0], "is_meta", False):
            if args[0].numel() > self._space.numel() or args[0].dtype != self._space.dtype:
                self._space = torch.empty(args[0].numel(), dtype=args[0].dtype)
            func(self._space[: args[0].numel()].view(args[0].shape), *args[1:], **kwargs)
        return func(*args, **kwargs)
