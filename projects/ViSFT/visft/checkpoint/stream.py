"""Reads a base's weight file in pieces: its tensors, their names in open_clip, and a CLIP built from them.

open_clip draws random weights, reads the whole file and copies. This needs memory for twice the model, text encoder
included, which is too much for towers with billions of parameters.

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
"""Bytes that are read at a time."""

REMAP = 32 << 20
"""Bytes read from a mapped file before it is mapped anew."""


class TensorFile:
    """Tensors of a safetensors or PyTorch file, by name, read when they are used.

    PyTorch files older than its zip format cannot be mapped. They are in memory as a whole.

    Attributes:
        path: the file.
        mapped: its tensors, memory-mapped. Each new mapping replaces them.

    Raises:
        CheckpointError: as `files.read_tensors`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.mapped: dict[str, Tensor] = map_tensors(path)
        self._starts = safetensors_starts(path)
        # One buffer for all parts: freed between other objects, one for each would fragment the memory.
        self._buffer = torch.empty(CHUNK if self._starts else 0, dtype=torch.uint8)
        self._touched = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.mapped.items()}

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's values in order, flat, about `CHUNK` bytes at a time.

        A part is valid until the next part of this file is read.
        """
        if name in self._starts:
            yield from self._read(name)
            return
        size, step = self.mapped[name].numel(), max(1, CHUNK // self.mapped[name].itemsize)
        for start in range(0, size, step):
            if self._touched > REMAP:
                self.mapped.clear()  # before the new mapping, so that there are never two
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
            # Opened for each part, because a consumer may stop at any.
            with open(local_path(self.path), "rb") as file:
                file.seek(place)
                if file.readinto(part.numpy()) < len(part):
                    raise CheckpointError(
                        f"{self.path}: was cut off while it was read; fetch or write it again."
                    )
            place += len(part)
            yield part.view(tensor.dtype)

    def lazy(self, name: str, shape: tuple[int, ...]) -> Lazy:
        """Return a tensor for another file. `shape` must have as many elements."""
        return Lazy(self.mapped[name].dtype, tuple(shape), lambda: self.parts(name))

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Fill and return `out`, a tensor of as many elements, of any type and device."""
        flat, start = out.view(-1), 0
        for part in self.parts(name):
            flat[start : start + len(part)].copy_(part)
            start += len(part)
            del part
        return out


# Names

OPEN_CLIP, EVA_CLIP, BARE = "open_clip", "EVA-CLIP", "bare tower"

# EVA-CLIP's names in the tower that differ from timm's, which open_clip uses.
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
    """Return whose names these are. None: unknown."""
    names = list(names)
    if any(name.startswith(("visual.trunk.", "visual.transformer.", "visual.conv1.")) for name in names):
        return OPEN_CLIP
    if any(name.startswith("visual.blocks.") for name in names):
        return EVA_CLIP
    return BARE if any(name.startswith("blocks.") for name in names) else None


def to_open_clip(names: Collection[str], expected: Collection[str], what: str) -> dict[str, str]:
    """Return the names in a base's file by open_clip's names, without tensors that open_clip computes itself.

    Args:
        names: in the file.
        expected: all names of open_clip's model. They show where its text encoder is.
        what: the file, for messages.

    Raises:
        CheckpointError: the file has no tower, or two of its names become the same.
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
    """Compare all names and shapes of a base with an architecture.

    Args:
        sources: from `to_open_clip`.
        found: shapes by the file's names.
        expected: shapes by open_clip's names.
        optional: open_clip's names that may be missing.

    Raises:
        CheckpointError: names the tensor that has another shape, is missing, or has no place.
    """
    hint = f"give the weights of {architecture}, or name the base's architecture in MODEL.CLIP_VIT.NAME."
    # The tower before the text encoder, in the architecture's order.
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
    # Some files store a scale with a dimension, some without.
    return left == right or {left, right} == {(), (1,)}


# A CLIP


def build(described: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Build a CLIP whose parameters are on `meta`, and whose buffers (rotary tables, masks...) are real.

    It leaves torch's generator in the same state as open_clip's own construction. What is drawn afterwards (fresh
    heads, LoRA) is therefore the same whether weights are drawn or streamed.

    Args:
        described: the same CLIP by open_clip, all on `meta`. It gives class and preprocessing.
        config: of the architecture, from open_clip.
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
    """Load the weights of a file into a CLIP from `build`, one at a time.

    All names and shapes are compared. Values are read only of the wanted parameters, in the model's types.

    Args:
        path: a whole CLIP with names of open_clip or EVA-CLIP, or others that open_clip converts, as safetensors or a
            PyTorch file.
        name: of the architecture, for messages.
        seen: converts the file's tensors to what open_clip reads. Not used for EVA-CLIP's.
        wanted: whether a parameter is to be loaded; the others stay on `meta`.
        device: where the loaded parameters go.

    Raises:
        CheckpointError: the file is broken, or it is EVA-CLIP's and does not fit.
        RuntimeError: the file does not fit (raised by open_clip).
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
        if old is not None and id(old) in made:  # one parameter with two names
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
    """Return the names in an EVA-CLIP file, which open_clip does not load, by the model's names."""
    expected = {n: tuple(t.shape) for n, t in clip.state_dict().items()}
    sources = to_open_clip(file.mapped, expected, str(file.path))
    check_names(sources, file.shapes(), expected, str(file.path), name)
    return sources


def _by_open_clip(
    clip: nn.Module, file: TensorFile, seen: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, str | Tensor]:
    """Return for each of the model's names the name in the file, or a tensor if open_clip converts it.

    open_clip loads the mapped tensors into the model, which converts names, resizes, and raises an error if they do not
    fit. Parameters on `meta` take no values.
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
    """Move parameters to `meta` when modules register them. Other tensors stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if (
            parameter is not None and not parameter.is_meta
        ):  # otherwise it was registered before, under another name
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class _Draws(TorchDispatchMode):
    """Draws the random numbers for tensors on `meta`, too, and discards them."""

    def __init__(self) -> None:
        super().__init__()
        # One buffer for all: freed between the model's small objects, one for each would fragment the memory.
        self._space = torch.empty(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and getattr(args[0], "is_meta", False):
            if args[0].numel() > self._space.numel() or args[0].dtype != self._space.dtype:
                self._space = torch.empty(args[0].numel(), dtype=args[0].dtype)
            func(self._space[: args[0].numel()].view(args[0].shape), *args[1:], **kwargs)
        return func(*args, **kwargs)
