"""Reader of golden packs: outputs of the authors' code for weights that are drawn from the parameters' names."""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from visft.modeling.backbone import CLIPViT, lora

FOLDER = Path(os.environ.get("VISFT_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FLAVOURS = sorted(path.stem for path in FOLDER.glob("*.json"))
TOWER, HEADS = "visft_heads.backbone.0.", "visft_heads."


def draw(salt: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of a name, as the pack's own description prescribes."""
    value = probe(salt, name, shape).numpy()
    if len(shape) == 1 and name.endswith("weight"):
        value = 1 + 0.1 * value
    elif len(shape) == 1:
        value = 0.05 * value
    elif "lora" in name:
        value = 0.3 * value
    elif any(part in name for part in ("embedding", "pos_embed", "query")):
        value = 0.02 * value
    else:
        value = value / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def probe(salt: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 numbers from a name."""
    state = np.random.RandomState(zlib.crc32((salt + name).encode()))
    return torch.from_numpy(state.standard_normal(tuple(shape)).astype(np.float32))


class Pack:
    """One flavour of a golden pack.

    Attributes:
        layout: parameter shapes by the authors' names.
        tensors: inputs and expected outputs by name.
    """

    def __init__(self, flavour: str):
        description = json.loads((FOLDER / f"{flavour}.json").read_text())
        self.flavour: str = description["flavour"]
        self.depth: int = description["depth"]
        self.num_heads: int = description["num_heads"]
        self.salt: str = description["salt"]
        self.sizes: list[list[int]] = description["sizes"]
        self.layout: dict[str, list[int]] = dict(description["layout"])
        self.tensors: dict[str, torch.Tensor] = load_file(FOLDER / f"{flavour}.safetensors")

    def weights(self, prefix: str = HEADS) -> dict[str, torch.Tensor]:
        """All weights whose name begins so, under the authors' full names."""
        return {n: draw(self.salt, n, shape) for n, shape in self.layout.items() if n.startswith(prefix)}

    def probe(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The pack's random probe of a name (`probe_logits`, `probe_masks`)."""
        return probe(self.salt, name, shape)

    @property
    def images(self) -> list[torch.Tensor]:
        """The normalised images, `[3, H, W]` each."""
        return [self.tensors[f"image_{i}"] for i in range(len(self.sizes))]

    def batch(self) -> torch.Tensor:
        """The images padded with zeros at the bottom and right to a common size, `[N, 3, H, W]`."""
        height, width = (max(image.shape[i] for image in self.images) for i in (1, 2))
        return torch.stack(
            [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in self.images]
        )

    def backbone(self, with_lora: bool = True, **options) -> CLIPViT:
        """The tower with the pack's weights, the authors' dense forward, and the pack's LoRA (mode `lora`)."""
        from timm.models.eva import Eva

        weights = {name.removeprefix(TOWER): w for name, w in self.weights(TOWER).items()}
        adapters = {name: weights.pop(name) for name in list(weights) if "lora_" in name}
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        tower = Eva(
            img_size=grid * patch,
            patch_size=patch,
            num_classes=0,
            global_pool="token",
            embed_dim=width,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=(hidden + 0.5) / width,  # half a unit, so that int(ratio * width) cannot round below
            use_post_norm=self.flavour == "e",
        )
        missing, unknown = tower.load_state_dict(weights, strict=False)
        assert missing == ["cls_token"] and not unknown, (
            missing,
            unknown,
        )  # the authors' forward has no class token
        backbone = CLIPViT(tower, class_token="drop", **options).eval()
        if with_lora:
            first = next(iter(adapters))
            rank = adapters[first].shape[0] // 2
            lora.inject(backbone, rank=rank, alpha=1.0, targets=("q", "v"))
            lora.load_state_dict(backbone, self.split(adapters))
        return backbone

    def split(self, fused: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fused q and v matrices of the authors (`blocks.0.attn.qkv.lora_A`) to our adapters' names."""
        out = {}
        for name, tensor in fused.items():
            block, _, matrix = name.partition(".attn.qkv.")
            q, v = tensor.chunk(2)  # q's rows come first, in A and in B
            out |= {f"tower.{block}.lora.q.{matrix}": q, f"tower.{block}.lora.v.{matrix}": v}
        return out

    def lora_gradients(self, kind: str) -> dict[str, torch.Tensor]:
        """Expected gradients by our adapters' names; `kind` is `det`, `cap` or `seg`."""
        fused = {}
        for i in range(self.depth):
            for matrix in ("lora_A", "lora_B"):
                fused[f"blocks.{i}.attn.qkv.{matrix}"] = self.tensors[f"grad_{kind}_{matrix}_{i}"]
        return self.split(fused)
