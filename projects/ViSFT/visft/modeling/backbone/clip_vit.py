"""The vision tower of a CLIP as a detectron2 backbone."""

import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from visft.checkpoint.open_clip_models import (
    OPENAI_MEAN,
    OPENAI_STD,
    BaseTower,
    StoredClip,
    create_clip,
    undrawn_clip,
)
from visft.errors import ConfigError, check_one_of
from visft.modeling.backbone import frozen_weights
from visft.modeling.backbone.recompute import Budget, recomputed
from visft.modeling.backbone.tower_adapters import adapt
from visft.modeling.backbone.windows import Windows

logger = logging.getLogger(__name__)

FEATURE = "last_feat"


class CLIPViT(Backbone):
    """Dense features of a CLIP vision transformer at any image size, from the weights that its embedding comes from.

    The tower is held by reference under its own parameter names (`tower.` + open_clip's name below `visual.`).

    Args:
        tower: `visual` of an open_clip model, or timm's VisionTransformer or Eva.
        class_token: `keep`: the class token stays in the sequence, as in CLIP. `drop`: patches alone, and the position
            embedding resized without antialiasing, as ViSFT's authors do.
        patch_size: stride of the feature map in pixels; the patch embedding is resampled to it in every forward, so the
            tower's own weight keeps its shape. None or 0: the tower's own.
        window_size: side in patches of the windows that blocks attend within; 0: all attend globally.
        global_blocks: indices of blocks that attend globally although `window_size` is set; (): every fourth, the
            last included.
        train: `none`, `lora` or `full`; see `set_train`.
        activation_checkpointing: recompute blocks in the backward pass, but for their attention.
        memory_budget_gib: with `activation_checkpointing`, GiB of activations that blocks may keep instead, the last
            blocks first. They are freed before the first recomputed block needs room for its own.
        offload_activations: with `activation_checkpointing`, keep the inputs of recomputed blocks in the host's memory.
        frozen_dtype: `float16` or `bfloat16`: how the blocks' weight matrices are stored when they do not train, and
            computed with outside of autocast; other types are kept between them. `int8`: how they are stored, but not
            computed with. None or "": as they are.
        base: what the tower's weights came from, when known.

    Raises:
        ConfigError: the tower is no plain vision transformer, or an argument is out of range.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        class_token: str = "keep",
        patch_size: int | None = None,
        window_size: int = 0,
        global_blocks: Sequence[int] = (),
        train: str = "none",
        activation_checkpointing: bool = False,
        memory_budget_gib: float = 0.0,
        offload_activations: bool = False,
        frozen_dtype: str | None = None,
        base: BaseTower | None = None,
    ):
        super().__init__()
        check_one_of("MODEL.CLIP_VIT.CLASS_TOKEN", class_token, ("keep", "drop"))
        frozen_weights.check(frozen_dtype or "")
        if (patch_size or 0) < 0 or window_size < 0:
            raise ConfigError(
                f"MODEL.CLIP_VIT.PATCH_SIZE is {patch_size} and WINDOW_SIZE {window_size}; expected 0 (off) or more."
            )
        if memory_budget_gib < 0 or (memory_budget_gib and not activation_checkpointing):
            raise ConfigError(
                f"MODEL.CLIP_VIT.MEMORY_BUDGET_GIB is {memory_budget_gib}; it must be 0, or positive with "
                "ACTIVATION_CHECKPOINTING True."
            )
        if offload_activations and not activation_checkpointing:
            raise ConfigError(
                "MODEL.CLIP_VIT.OFFLOAD_ACTIVATIONS is True; it needs ACTIVATION_CHECKPOINTING True, too."
            )
        self._parts = adapt(tower)
        self.tower = tower
        depth = len(self._parts.blocks)
        outside = [i for i in global_blocks if not 0 <= i < depth]
        if outside:
            raise ConfigError(
                f"MODEL.CLIP_VIT.GLOBAL_BLOCKS has {outside[0]}; the tower's blocks are 0 to {depth - 1}."
            )
        self.class_token = class_token
        self.window_size = window_size
        every_fourth = [i for i in range(depth) if (depth - 1 - i) % 4 == 0]
        self.global_blocks = frozenset(global_blocks or every_fourth)
        self.activation_checkpointing = activation_checkpointing
        self.offload_activations = offload_activations
        self.memory_budget = Budget(memory_budget_gib)
        self.frozen_dtype = frozen_dtype or ""
        self.stride = patch_size or self._parts.patch_size
        self.base = base
        self.lora_config = None
        preprocess = getattr(tower, "preprocess_cfg", None) or {}
        self.mean = tuple(preprocess.get("mean") or getattr(tower, "image_mean", None) or OPENAI_MEAN)
        self.std = tuple(preprocess.get("std") or getattr(tower, "image_std", None) or OPENAI_STD)
        self.set_train(train)

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        device: torch.device | str = "cpu",
        **options,
    ) -> "CLIPViT":
        """The vision tower of an open_clip model. Of pretrained weights, the tower's alone are read.

        Args:
            name: an architecture that open_clip knows, or `visft-tiny`.
            pretrained: a tag of open_clip, `demo` for `visft-tiny`, a file, or None for random weights.
            device: where the tower goes, tensor by tensor. `meta`: no weights are read or drawn, and no file is needed.
            options: the constructor's keywords.

        Raises:
            ConfigError: unknown name or tag, or a tower that is no plain vision transformer.
            CheckpointError: the weights are missing, unreadable or of another model.
        """
        if torch.device(device).type == "meta":
            clip, base = undrawn_clip(name, pretrained)
            return cls(clip.visual, base=base, **options)
        if not pretrained:
            clip, base = create_clip(name)
            return cls(clip.visual, base=base, **options).to(device)
        stored = StoredClip(name, pretrained)
        clip = stored.build()
        backbone = cls(clip.visual, **options)  # which decides the types that weights are stored in
        stored.load(clip, lambda name: name.startswith("visual."), device)
        backbone._store_frozen()
        backbone.base = stored.base()
        return backbone.to(device)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return self._parts.blocks

    @property
    def adapters(self) -> list[nn.Module]:
        """The LoRA of each block that has some (`lora.BlockLora`)."""
        return [block.lora for block in self.blocks if hasattr(block, "lora")]

    @property
    def embed_dim(self) -> int:
        """Channels of the feature map."""
        return self._parts.embed_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels that the tower was pretrained at."""
        return self._parts.image_size

    def stem_parameters(self) -> list[nn.Parameter]:
        """Parameters that act before the first block: patch and position embedding, class token, norm."""
        return list(self._parts.stem_parameters(prefix=True))

    def base_clip(self, *, visual: bool = True) -> nn.Module:
        """The whole CLIP that the tower came from, or all but its `visual`; see `BaseTower.clip`.

        Raises:
            ConfigError: the tower was given without `base`.
        """
        if self.base is None:
            raise ConfigError(
                "This CLIPViT was made of a bare tower; pass the whole CLIP (open_clip model, file or tag) as base."
            )
        return self.base.clip(visual=visual)

    # What trains

    def set_train(self, mode: str) -> None:
        """Choose what trains.

        Args:
            mode: `none`; `lora`: the adapters of `lora.inject` alone; `full`: everything that the dense features depend
                on (not the pooler and the projection to the CLIP embedding).

        Raises:
            ConfigError: unknown mode; `lora` without adapters; `full` with `frozen_dtype`.
        """
        check_one_of("MODEL.CLIP_VIT.TRAIN", mode, ("none", "lora", "full"))
        if mode == "lora" and not self.adapters:
            raise ConfigError(
                "MODEL.CLIP_VIT.TRAIN is 'lora', but the tower has no LoRA; call lora.inject first."
            )
        if mode == "full" and self.frozen_dtype:
            raise ConfigError(
                f"MODEL.CLIP_VIT.FROZEN_DTYPE is '{self.frozen_dtype}' and TRAIN is 'full': all weights train, so "
                "none can be stored in low precision; set FROZEN_DTYPE to ''."
            )
        self.train_mode = mode
        self.tower.requires_grad_(False)
        if mode == "full":
            for parameter in self._parts.stem_parameters(prefix=self.class_token == "keep"):
                parameter.requires_grad_(True)
            for module in (*self.blocks, self._parts.dense_norm()):
                module.requires_grad_(True)
        for adapters in self.adapters:
            adapters.requires_grad_(mode == "lora")
        self._store_frozen()
        self.train(self.training)

    def _store_frozen(self) -> None:
        if self.frozen_dtype:
            for block in self.blocks:
                frozen_weights.store(block, self.frozen_dtype)

    def train(self, mode: bool = True) -> "CLIPViT":
        """As nn.Module's, but a tower that does not train keeps its evaluation behaviour (no dropout, no drop path)."""
        super().train(mode)
        if self.train_mode != "full":
            self.tower.eval()
            for adapters in self.adapters:
                adapters.train(mode and self.train_mode == "lora")
        return self

    # Forward

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Dense features.

        Args:
            images: normalised, `[N, 3, H, W]`. Sides that the stride does not divide are padded with zeros at the
                bottom and right.

        Returns:
            `{"last_feat": [N, C, ceil(H / stride), ceil(W / stride)]}`.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        keep = self.class_token == "keep"
        x, grid, prefix = self._run(
            images, patch_size=self.stride, prefix=keep, antialias=keep, window_size=self.window_size
        )
        x = self._parts.dense_norm()(x[:, prefix:])
        return {FEATURE: x.transpose(1, 2).unflatten(2, grid).contiguous()}

    def image_embedding(self, images: torch.Tensor) -> torch.Tensor:
        """The tower's own CLIP embedding, not normalised to unit length.

        Always computed as CLIP does (class token, own patches, global attention), whatever the options for dense
        features; at the native size equal to open_clip's `encode_image(images, normalize=False)`.

        Args:
            images: normalised, `[N, 3, H, W]`.

        Returns:
            `[N, D]`.
        """
        x, _, _ = self._run(
            images, patch_size=self._parts.patch_size, prefix=True, antialias=True, window_size=0
        )
        return self._parts.embedding(x)

    def map_and_embedding(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense features and the CLIP embedding from one pass, both as CLIP computes (see `image_embedding`).

        Args:
            images: normalised, `[N, 3, H, W]`; the tower's own patch divides the sides.

        Returns:
            The map `[N, C, h, w]` after the tower's last norm, and `[N, D]`.
        """
        x, grid, prefix = self._run(
            images, patch_size=self._parts.patch_size, prefix=True, antialias=True, window_size=0
        )
        dense = self._parts.dense_norm()(x[:, prefix:]).transpose(1, 2).unflatten(2, grid)
        return dense.contiguous(), self._parts.embedding(x)

    def patch_embeddings(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings of patches, as MaskCLIP has them but for its change of the last block (arXiv:2112.01071, 3.2).

        An image whose patches are all alike has their embedding.

        Args:
            features: of `last_feat`, or means of them, `[..., C]`.

        Returns:
            `[..., D]` of unit length on the tower's device, computed in float32 whatever the weights are stored in and
            under any autocast.
        """
        device = self._parts.patch_layer().weight.device
        with torch.autocast(device.type, enabled=False):
            rows = features.to(device).float().reshape(-1, features.shape[-1])
            found = F.normalize(self._parts.project_patches(rows).float(), dim=-1)
        return found.view(*features.shape[:-1], -1)

    def _first_trained(self) -> int:
        """Index of the first block that something trains in or before; the number of blocks when nothing does."""
        if any(p.requires_grad for p in self.stem_parameters()):
            return -1
        for i, block in enumerate(self.blocks):
            if any(p.requires_grad for p in block.parameters()):
                return i
        return len(self.blocks)

    def _run(
        self, images: torch.Tensor, *, patch_size: int, prefix: bool, antialias: bool, window_size: int
    ) -> tuple[torch.Tensor, tuple[int, int], int]:
        """All blocks, without the last norm: tokens `[N, prefix + h * w, C]`, `(h, w)`, number of prefix tokens.

        No graph is built before the first block that trains.
        """
        first = -1 if images.requires_grad else self._first_trained()
        with nullcontext() if first < 0 else torch.no_grad():
            x, grid = self._parts.embed(images, patch_size=patch_size, prefix=prefix, antialias=antialias)
            count = self._parts.num_prefix_tokens if prefix else 0
            rope = self._parts.rope(grid, x.device)
        windows, inside = Windows(grid, window_size, count), False
        rope_and_mask = {False: (rope, None)}
        if window_size:
            rope_and_mask[True] = (windows.split_rope(rope, len(x)), windows.mask(len(x), x.device))
        keep = None  # how many blocks, the last ones
        for i, block in enumerate(self.blocks):
            with nullcontext() if i >= first else torch.no_grad():
                windowed = bool(window_size) and i not in self.global_blocks
                if windowed != inside:  # neighbours with the same kind of attention share one permutation
                    x, inside = (windows.split(x) if windowed else windows.join(x)), windowed
                run, arguments = functools.partial(block, prefix=count), (x, *rope_and_mask[inside])
                recompute = self.activation_checkpointing and torch.is_grad_enabled()
                if recompute and keep is None:
                    keep = self.memory_budget.blocks(run, *arguments)
                if recompute and i < len(self.blocks) - keep:
                    x = recomputed(block, run, *arguments, offload=self.offload_activations)
                else:
                    x = run(*arguments)
        return (windows.join(x) if inside else x), grid, count

    # The interface of detectron2's backbones

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of `last_feat`."""
        return {FEATURE: ShapeSpec(channels=self.embed_dim, stride=self.stride)}

    @property
    def size_divisibility(self) -> int:
        """Batches are padded to multiples of the stride."""
        return self.stride

    @property
    def padding_constraints(self) -> dict[str, int]:
        """As `size_divisibility`; no square is required."""
        return {"size_divisibility": self.stride, "square_size": 0}
