"""A CLIP built without memory for its weights, into which they are streamed from a file: never two copies of it.

open_clip draws random weights, reads the whole file beside them and copies. That is twice the model, for which towers
of billions of parameters leave no room.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

from ..backbone import open_clip_zoo
from ..errors import CheckpointError
from . import files, stream_names
from .stream import open_tensors


def load_clip(
    name: str, path: str | os.PathLike, dtype: torch.dtype | None = None
) -> tuple[nn.Module, open_clip_zoo.BaseTower]:
    """A whole CLIP of open_clip with the weights of a file, on the CPU and in evaluation mode.

    Args:
        name: an architecture of open_clip whose text tower is open_clip's own.
        path: a complete base under open_clip's or EVA-CLIP's names, safetensors or PyTorch's.
        dtype: of the parameters; None: float32.

    Returns:
        The model, and where it came from.

    Raises:
        ConfigError: open_clip does not know the name.
        CheckpointError: the file is broken, or does not fit the architecture by name and shape; or the text tower is
            one of Hugging Face.
    """
    clip = build(name)
    expected = {n: tuple(t.shape) for n, t in clip.state_dict().items()}
    what = f"MODEL.CLIP_VIT.PRETRAINED: {path}"
    with open_tensors(path) as file:
        found = stream_names.to_open_clip(file.entries, expected, what)
        stream_names.check(found, {n: e.shape for n, e in file.entries.items()}, expected, what, name)
        for target, source in found.sources.items():
            owner, _, leaf = target.rpartition(".")
            module = clip.get_submodule(owner)
            value = file.read(source).reshape(expected[target])
            if leaf in module._parameters:
                value = value.to(dtype or torch.float32)
                module._parameters[leaf] = nn.Parameter(value, module._parameters[leaf].requires_grad)
            else:
                module._buffers[leaf].copy_(value)
    base = open_clip_zoo.BaseTower(name, os.fspath(path), files.sha256(path), clip)
    return clip.eval(), base


def build(name: str) -> nn.Module:
    """A CLIP whose parameters are on `meta` and whose buffers, rotary tables and masks among them, are real.

    Raises:
        ConfigError: open_clip does not know the name.
        CheckpointError: its text tower is one of Hugging Face.
    """
    open_clip_zoo.check_name(name)
    module, config = open_clip_zoo.open_clip(), open_clip_zoo.open_clip().get_model_config(name)
    if "hf_model_name" in config["text_cfg"]:
        raise CheckpointError(
            f"MODEL.CLIP_VIT.NAME {name}: its text tower is no open_clip's, which is all that can be built without its "
            "weights; use another architecture."
        )
    described = open_clip_zoo.meta_clip(name)
    config.pop("custom_text", None)
    config["vision_cfg"]["timm_model_pretrained"] = False
    with _parameters_on_meta():
        clip = type(described)(**config)
    module.model.set_model_preprocess_cfg(clip, described.visual.preprocess_cfg)
    return clip


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go to `meta` as modules take them; what is computed from none of them stays real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
