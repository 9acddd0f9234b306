"""LoRA (arXiv:2106.09685) inside the projections of a CLIPViT's blocks: y = W x + (alpha / rank) B A x.

Adapters live at `block.lora.<projection>.lora_A / lora_B`; the tower's own parameters keep their names and places.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from visft.checkpoint.copying import load_into
from visft.errors import CheckpointError, ConfigError, check_one_of
from visft.modeling.backbone.blocks import TARGETS, Projection, projections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraConfig:
    """What `inject` was called with; `last_blocks` 0 means all."""

    rank: int = 64
    alpha: float = 1.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    last_blocks: int = 0


class Adapter(nn.Module):
    """The update (alpha / rank) B A of one projection.

    Args:
        in_features, out_features: of the projection.
        config: rank, alpha and dropout (on the input, in training).
    """

    def __init__(self, in_features: int, out_features: int, config: LoraConfig):
        super().__init__()
        self.scaling = config.alpha / config.rank
        self.dropout = config.dropout
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.base: torch.Tensor | None = None  # the projection's weight before merging, while merged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, through the rank: never a dense product."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The dense update `[out_features, in_features]`, float32, within an autocast region too."""
        return self.update(self.lora_A, self.lora_B)

    def update(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`delta` of other matrices than its own."""
        with torch.autocast(a.device.type, enabled=False):
            return self.scaling * (b.float() @ a.float())


class BlockLora(nn.ModuleDict):
    """The adapters of one block, by projection key. While `merged` they are part of the weights and do not act; while
    `off` they do not act either (see `switched_off`)."""

    merged = False
    off = False


@dataclass(frozen=True)
class Site:
    """Where an adapter acts: block index, projection, adapter, and the parameter's full name below the backbone."""

    block: int
    projection: Projection
    adapter: Adapter
    weight_name: str
    weight: nn.Parameter


def options(cfg: CfgNode) -> dict[str, Any]:
    """The keywords of `inject` that `cfg.MODEL.LORA` gives."""
    node = cfg.MODEL.LORA
    return {
        "rank": node.RANK,
        "alpha": node.ALPHA,
        "dropout": node.DROPOUT,
        "targets": tuple(node.TARGETS),
        "last_blocks": node.LAST_BLOCKS,
    }


def check(config: LoraConfig, depth: int) -> None:
    """Check what is to be injected into a tower of `depth` blocks.

    Raises:
        ConfigError: the first value that is out of range.
    """
    for target in config.targets:
        check_one_of("MODEL.LORA.TARGETS", target, TARGETS)
    if not config.targets:
        raise ConfigError(f"MODEL.LORA.TARGETS is empty; expected some of {', '.join(TARGETS)}")
    if config.rank < 1:
        raise ConfigError(f"MODEL.LORA.RANK is {config.rank}; expected at least 1")
    if not 0 <= config.last_blocks <= depth:
        raise ConfigError(
            f"MODEL.LORA.LAST_BLOCKS is {config.last_blocks}; the tower has {depth} blocks, expected at most so many "
            "(0: all)"
        )
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"MODEL.LORA.DROPOUT is {config.dropout}; expected at least 0 and below 1")


def inject(
    backbone: nn.Module,
    rank: int = 64,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("q", "v"),
    last_blocks: int | None = None,
) -> nn.Module:
    """Add adapters to a CLIPViT's blocks (never to a pooler) and let nothing but them train.

    B is zero at first, so outputs stay the same to the bit. The backbone's mode becomes `lora`.

    Args:
        backbone: a CLIPViT without LoRA.
        rank, alpha: the update is (alpha / rank) B A. ViSFT's authors use 64 and 1.
        dropout: on the adapters' input, in training.
        targets: of q, k, v, proj, fc1, fc2; SwiGLU's gate goes with fc1.
        last_blocks: only the last n blocks; None or 0: all.

    Returns:
        The backbone.

    Raises:
        ConfigError: an argument is out of range, or there are adapters already.
    """
    if has_lora(backbone):
        raise ConfigError("LoRA is in this backbone already; build a new one to change its rank or targets.")
    targets, depth, last = tuple(targets), len(backbone.blocks), last_blocks or 0
    config = LoraConfig(rank, float(alpha), float(dropout), targets, last)
    check(config, depth)
    for block in backbone.blocks[depth - last if last else 0 :]:
        block.lora = BlockLora()
        for p in projections(block):
            if p.target in targets:
                weight = block.get_parameter(p.weight)
                adapter = Adapter(weight.shape[1:].numel(), p.stop - p.start, config)
                block.lora[p.key] = adapter.to(weight.device)
    backbone.lora_config = config
    backbone.set_train("lora")
    count = sum(p.numel() for p in state_dict(backbone).values())
    logger.info("LoRA of rank %d on %s of %d blocks: %d parameters", rank, targets, last or depth, count)
    return backbone


def has_lora(backbone: nn.Module) -> bool:
    """Whether adapters were injected."""
    return bool(backbone.adapters)


def sites(backbone: nn.Module) -> Iterator[Site]:
    """All adapters with the weights they act on, block by block."""
    prefixes = {id(module): name for name, module in backbone.named_modules()}
    for i, block in enumerate(backbone.blocks):
        if not hasattr(block, "lora"):
            continue
        for p in projections(block):
            if p.key in block.lora:
                name = f"{prefixes[id(block)]}.{p.weight}"
                yield Site(i, p, block.lora[p.key], name, block.get_parameter(p.weight))


def is_merged(backbone: nn.Module) -> bool:
    """Whether the adapters are merged into the weights."""
    return any(adapters.merged for adapters in backbone.adapters)


@torch.no_grad()
def merge(backbone: nn.Module) -> nn.Module:
    """Add the adapters to the weights; they no longer act on their own.

    The original weights are kept with the adapters until `unmerge`: subtracting would leave rounding errors.

    Raises:
        ConfigError: there are no adapters, they are merged already, or the weights are stored as int8.
    """
    _require(backbone, merged=False)
    if backbone.frozen_dtype == "int8":
        raise ConfigError(
            "MODEL.CLIP_VIT.FROZEN_DTYPE is int8, which LoRA's update would be rounded to; export the tower, or load "
            'it with FROZEN_DTYPE "" to merge.'
        )
    for site in sites(backbone):
        rows = site.weight[site.projection.start : site.projection.stop]
        site.adapter.base = rows.clone()
        rows.copy_(rows.float() + site.adapter.delta())
    for adapters in backbone.adapters:
        adapters.merged = True
    return backbone


@torch.no_grad()
def unmerge(backbone: nn.Module) -> nn.Module:
    """Restore the weights from before `merge`, to the bit; the adapters act on their own again.

    Raises:
        ConfigError: there are no adapters, or they are not merged.
    """
    _require(backbone, merged=True)
    for site in sites(backbone):
        site.weight[site.projection.start : site.projection.stop].copy_(site.adapter.base)
        site.adapter.base = None
    for adapters in backbone.adapters:
        adapters.merged = False
    return backbone


@contextlib.contextmanager
def switched_off(backbone: nn.Module) -> Iterator[None]:
    """A context in which the adapters do not act: the backbone computes what it did before `inject`.

    No backward pass belongs into it: a graph built outside must not recompute activations without the adapters
    (ACTIVATION_CHECKPOINTING).

    Raises:
        ConfigError: there are no adapters, or they are merged.
    """
    _require(backbone, merged=False)
    before = [adapters.off for adapters in backbone.adapters]
    for adapters in backbone.adapters:
        adapters.off = True
    try:
        yield
    finally:
        for adapters, off in zip(backbone.adapters, before, strict=True):
            adapters.off = off


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def state_dict(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, by their names in `backbone.state_dict()`."""
    return {name: tensor for name, tensor in backbone.state_dict().items() if _is_lora(name)}


def load_state_dict(backbone: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `state_dict` gave.

    Raises:
        CheckpointError: names or shapes differ from the backbone's adapters; nothing is changed then.
        ConfigError: there are no adapters, or they are merged.
    """
    _require(backbone, merged=False)
    foreign = [name for name in tensors if not _is_lora(name)]
    if foreign:
        raise CheckpointError(f"LoRA weights: {foreign[0]} is no LoRA; give what lora.state_dict returns.")
    hint = "Set MODEL.CLIP_VIT.NAME and MODEL.LORA to what the weights were trained with."
    load_into(backbone, tensors, what="LoRA weights", names=state_dict(backbone), hint=hint)


def _require(backbone: nn.Module, merged: bool) -> None:
    if not has_lora(backbone):
        raise ConfigError("There is no LoRA in this backbone; call lora.inject first.")
    if is_merged(backbone) != merged:
        state = "merged already" if is_merged(backbone) else "not merged"
        raise ConfigError(
            f"LoRA is {state}; lora.merge and lora.unmerge take turns, and loading needs it unmerged."
        )
