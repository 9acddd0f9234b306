"""A CLIP built without memory for its weights, into which those that are wanted are streamed from a file.

open_clip draws random weights, reads the whole file beside them and copies. That is twice the model, text tower
included, for which towers of billions of parameters leave no room.
"""

import contextlib
import copy
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visft.checkpoint import stream_names
from visft.checkpoint.stream import TensorFile


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
    with TensorFile(path) as file:
        eva_clip = stream_names.kind_of(file.entries) == stream_names.EVA_CLIP
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
    found = stream_names.to_open_clip(file.entries, expected, str(file.path))
    stream_names.check(found, {n: e.shape for n, e in file.entries.items()}, expected, str(file.path), name)
    return found.sources


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
