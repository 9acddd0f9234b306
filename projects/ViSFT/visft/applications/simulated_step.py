"""One training step with tensors that have a shape and no values: its memory and its floating-point operations.

The step is the run's own code: the model, the losses, the backward pass and the optimizer, on torch's fake tensors.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from unittest.mock import patch

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from visft.engine.optimizer import build_optimizer
from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT
from visft.modeling.heads.common import losses
from visft.modeling.heads.common.matcher import Matching, match
from visft.modeling.heads.detr import detr_head
from visft.modeling.heads.mask2former import mask2former_head
from visft.modeling.meta_arch import ViSFT
from visft.utils import mixed_precision

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_ATEN = torch.ops.aten
CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *args, **kwargs: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Operations from the arguments' shapes of what torch's own registry lacks."""
_FLOPS = flop_registry | {packet: shape_wrapper(count) for packet, count in CPU_ATTENTION.items()}

_FEW = 2
"""Blocks of a kind that are run, and one more."""


@dataclass(frozen=True)
class Step:
    """Bytes in one process, and floating-point operations (a product and a sum are two), of one training step.

    Attributes:
        tower: what the tower's first pass leaves in memory, the images among it: its activations and its map.
        heads: what the heads, the tower losses (with their own passes of the tower) and the losses add to it.
        peak: the most that is in memory at once, weights and the optimizer's state included.
        forward, total: operations of the forward pass, and of the step.
    """

    tower: int
    heads: int
    peak: int
    forward: int
    total: int


def build(cfg: CfgNode) -> ViSFT:
    """The model of a config with fake weights on the CPU: no file is read and no memory is taken for the tower.

    The heads are built as they are, and their weights replaced.
    """
    cfg = cfg.clone()
    cfg.defrost()
    kind = mixed_precision.frozen_type(cfg)
    # Fake tensors have no int8 weights with scales.
    cfg.MODEL.CLIP_VIT.FROZEN_DTYPE = "bfloat16" if kind == "int8" else kind
    cfg.MODEL.DEVICE, cfg.MODEL.VISFT.HEAD_FILES = "meta", ()
    backbone = build_backbone(cfg)
    clip = backbone.base.clip()
    _make_fake(clip)
    if getattr(backbone._parts, "_rope", None) is not None:  # a copy, which is no module of the tower
        _make_fake(backbone._parts._rope)
    for name in ("logit_scale", "logit_bias"):  # read as a number
        if getattr(clip, name, None) is not None:
            setattr(clip, name, nn.Parameter(torch.zeros(())))
    model = ViSFT(cfg, backbone=backbone)
    _make_fake(model)
    return model


def text_encoder(model: ViSFT) -> list[nn.Parameter]:
    """The parameters of the base that are not the vision tower's."""
    tower = {id(parameter) for parameter in model.backbone.parameters()}
    return [p for p in model.backbone.base.clip().parameters() if id(p) not in tower]


def batch(
    images: int,
    size: tuple[int, int],
    *,
    objects: int,
    words: int,
    task: str | None = None,
    fake: bool = True,
) -> list[dict]:
    """Images of (height, width), each with boxes, masks and one caption, as the mapper gives them.

    Args:
        fake: whether images and masks have a shape alone. Otherwise they are zeros.
    """
    made = []
    for number in range(images):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, size[1] / 2, size[0] / 2]]).repeat(objects, 1))
        instances.gt_classes = torch.zeros(objects, dtype=torch.int64)
        with _FAKE if fake else contextlib.nullcontext():
            pixels = torch.zeros(3, *size, dtype=torch.uint8)
            instances.gt_masks = BitMasks(torch.zeros(objects, *size, dtype=torch.bool))
        made.append(
            {"image": pixels, "image_id": number, "height": size[0], "width": size[1], "instances": instances}
            | {"captions": [" ".join(["word"] * words)]}
            | ({} if task is None else {"task": task})
        )
    return made


def simulate(
    model: ViSFT,
    stage: str,
    solver: CfgNode,
    images: Sequence[dict],
    *,
    amp: str = "",
    gpu: bool = False,
    resident: Sequence[Tensor] = (),
    heads: CfgNode | None = None,
) -> Step:
    """Run one step, after a first one that has made the optimizer's state.

    Args:
        model: from `build`; its stage and gradients change.
        solver, heads: nodes of VISFT.SOLVER, as for `build_optimizer`.
        images: from `batch`.
        amp: the type of AMP, or "".
        gpu: count what a GPU's kernels keep: attention never keeps its matrix, and under AMP norms and softmax are in
            float32.
        resident: tensors in memory besides the model's.

    Raises:
        ConfigError: the step depends on the values of tensors.
    """
    model.set_stage(stage)
    model.train()
    optimizer = build_optimizer(model, solver, heads=heads)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in trained]
    accumulated = gradients if solver.ACCUMULATE > 1 else [None] * len(trained)
    kernels = _gpu_kernels if gpu else contextlib.nullcontext

    def run() -> tuple[int, ...]:
        for parameter, gradient in zip(trained, accumulated, strict=True):
            parameter.grad = gradient
        live = _Live(
            chain(
                model.parameters(), model.buffers(), resident, held, (g for g in accumulated if g is not None)
            )
        )
        start, marks = live.now, []
        hook = model.backbone.register_forward_hook(lambda *_: marks.append(live.now))
        try:
            with live, kernels(), _any_matching():
                with mixed_precision.autocast("cpu", amp):
                    found = model(list(images))
                total = sum(found.values())
                tower, forward = marks[0] if marks else start, (live.now, live.flops)
                total.backward()
                torch.nn.utils.clip_grad_norm_(trained, solver.CLIP_NORM or float("inf"))
                optimizer.step()
        finally:
            hook.remove()
        return tower - start, forward[0] - tower, live.peak, forward[1], live.flops

    try:
        tower, rest, peak, forward, total = _at_full_depth(model.backbone, run)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"--plan: a step of the heads {', '.join(model.heads)} depends on values ({error}), as a RCNNHead's "
            "proposals do, so it cannot be planned without running it; measure it with tools/benchmark.py"
        ) from error
    finally:
        model.zero_grad()
    # All gradients, at the end of the backward pass; a GPU's AdamW then takes the roots of all second moments at once.
    at_end = [*model.parameters(), *model.buffers(), *resident, *held, *gradients, *(trained if gpu else ())]
    return Step(tower, rest, max(peak, sum(map(_bytes, at_end))), forward, total)


def tower_activations(model: ViSFT, images: Sequence[dict], amp: str, gpu: bool) -> int:
    """`Step.tower` alone, in the model's stage; arguments as for `simulate`."""

    def run() -> tuple[int, ...]:
        live = _Live(chain(model.parameters(), model.buffers()))
        before = live.now
        with live, _gpu_kernels() if gpu else contextlib.nullcontext(), mixed_precision.autocast("cpu", amp):
            kept = model.extract(list(images))  # noqa: F841  its graph is what is counted
            return (live.now - before,)

    return _at_full_depth(model.backbone, run)[0]


def _at_full_depth(backbone: CLIPViT, run: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """What `run` returns for the whole tower, from runs with two and three blocks of a kind.

    Blocks before the first that trains or has LoRA are one kind, the rest another. What a block leaves in memory and
    computes is the same for all of a kind, so numbers grow by a straight line. Windows make further kinds; then the
    whole tower runs.
    """
    parts, blocks = backbone._parts, backbone.blocks
    second_kind = (hasattr(b, "lora") or any(p.requires_grad for p in b.parameters()) for b in blocks)
    first = next((i for i, found in enumerate(second_kind) if found), len(blocks))
    counts = [first, len(blocks) - first]
    if (
        backbone.window_size or backbone.memory_budget.gib
    ):  # what a budget keeps depends on the number of blocks
        return run()

    def with_blocks(frozen: int, trained: int) -> tuple[int, ...]:
        chosen = [*range(frozen), *range(len(blocks) - trained, len(blocks))]
        parts.blocks = [blocks[i] for i in chosen]
        try:
            return run()
        finally:
            parts.blocks = blocks

    few = [min(count, _FEW) for count in counts]
    found = base = with_blocks(*few)
    for kind, count in enumerate(counts):
        if count > _FEW:
            more = with_blocks(*(n + (i == kind) for i, n in enumerate(few)))
            found = tuple(f + (count - _FEW) * (m - b) for f, m, b in zip(found, more, base, strict=True))
    return found


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, views once, and the operations."""

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextlib.contextmanager
def _gpu_kernels() -> Iterator[None]:
    """On the CPU, attention with dropout keeps its matrix, autocast leaves norms and softmax in half precision, and
    masks are compared in smaller parts."""

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args, **kwargs) -> Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    def rows_at_once(length: int, device: torch.device) -> int:
        return rows(length, torch.device("cuda"))

    rows, attention = losses.rows_at_once, F.scaled_dot_product_attention
    # Not by a TorchFunctionMode: it is off while the backward pass recomputes activations.
    with (
        patch.object(
            F, "scaled_dot_product_attention", lambda *a, **k: attention(*a, **k | {"dropout_p": 0.0})
        ),
        patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        patch.object(F, "group_norm", in_float32(F.group_norm)),
        patch.object(Tensor, "softmax", in_float32(Tensor.softmax)),
        patch.object(losses, "rows_at_once", rows_at_once),
        patch.object(mask2former_head, "rows_at_once", rows_at_once),
    ):
        yield


@contextlib.contextmanager
def _any_matching() -> Iterator[None]:
    """Costs have no values, and any assignment is as large as the best one."""

    def match_zeros(costs: list[Tensor]) -> Matching:
        return match([torch.zeros(cost.shape) for cost in costs])

    with patch.object(detr_head, "match", match_zeros), patch.object(mask2former_head, "match", match_zeros):
        yield


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors on the CPU of the same shapes and types.

    Indices with values stay, because they decide shapes.
    """
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and (tensor.is_meta or tensor.is_floating_point()):
                    with _FAKE:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    table[name] = fake
    module.to = lambda *args, **kwargs: module  # torch cannot move fake parameters, and need not
