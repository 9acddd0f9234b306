"""`torch.compile` of the layers that an iteration spends its time in (`VISFT.COMPILE`)."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from visft.errors import ConfigError
from visft.modeling.heads.captioning.lstm_head import SoftAttention
from visft.modeling.heads.captioning.transformer_head import DecoderLayer as CaptionLayer
from visft.modeling.heads.detr.detr_transformer import DecoderLayer, EncoderLayer
from visft.modeling.heads.mask2former.mask_decoder import (
    CrossAttentionLayer,
    FeedForwardLayer,
    SelfAttentionLayer,
)
from visft.modeling.heads.mask2former.pixel_decoder import DeformableEncoderLayer

WHAT = ("", "blocks")
LAYERS = (
    *(EncoderLayer, DecoderLayer),
    *(DeformableEncoderLayer, CrossAttentionLayer, SelfAttentionLayer, FeedForwardLayer),
    *(SoftAttention, CaptionLayer),
)
"""The heads' layers. Matching, losses and whatever reads a value on the host is outside of them."""

BACKEND: str | Callable = "inductor"
VARIANTS = 64
"""Most graphs at a time. A kind of layer has one for each of: graph or none, with or without LoRA, masks, a batch of 1.
torch's own limit of 8 counts all kinds of layers together."""


@contextlib.contextmanager
def compiled(model: nn.Module, what: str) -> Iterator[None]:
    """Within the block, calls of the tower's blocks and the heads' layers are compiled (`blocks`), or none are ("").

    Layers of a kind share what is compiled, for all sizes of images: sizes are dynamic. Names, hooks and
    `forward` stay.

    Args:
        model: a ViSFT model.
        what: one of WHAT.
    """
    layers = [m for m in model.heads.modules() if isinstance(m, LAYERS)] + model.backbone.blocks
    before = [layer._compiled_call_impl for layer in layers]
    with contextlib.ExitStack() as stack:
        if what:
            import torch._dynamo  # takes a second
            from torch.fx.experimental import _config as shapes

            stack.enter_context(torch._dynamo.config.patch(cache_size_limit=VARIANTS))
            # Or a map that is square at first would be compiled again when it is not.
            stack.enter_context(shapes.patch(use_duck_shape=False))
        for layer in layers:
            layer._compiled_call_impl = None
            if what:
                layer.compile(dynamic=True, backend=BACKEND)
        try:
            yield
        finally:
            for layer, impl in zip(layers, before, strict=True):
                layer._compiled_call_impl = impl


def check_compiler(what: str) -> None:
    """Raise ConfigError if something is to be compiled and there is no C++ compiler, which inductor calls."""
    if not what or BACKEND != "inductor":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"VISFT.COMPILE is `{what}`, but torch.compile finds no C++ compiler; install g++ or name one in the "
            'environment variable CXX, or set VISFT.COMPILE to ""'
        ) from error
