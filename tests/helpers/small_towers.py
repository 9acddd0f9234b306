"""Small towers of every kind, by open_clip configurations of our own; `timm_models.py` makes timm's small ones."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import open_clip
import timm_models  # noqa: F401  (registers in timm)
import torch
from torch import nn

from visft.errors import ExportError
from visft.export import verification
from visft.modeling.backbone import CLIPViT, lora

HERE = Path(__file__).parent

TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
_SIGLIP = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-06},
}
_NATIVE = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
_MULTIMODAL = {**TEXT, "dim_head": 16, "n_queries": 4, "attn_pooler_heads": 2, "mlp_ratio": 4}


def _timm(name: str, size: int, pool: str = "token", proj: str | None = None) -> dict:
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": size,
    }


TOWERS = {
    "small-vit": {"embed_dim": 24, "vision_cfg": _NATIVE},
    "small-quickgelu": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
    },
    "small-oblong": {"embed_dim": 24, "vision_cfg": {**_NATIVE, "image_size": [32, 48]}},
    "small-layerscale": {"embed_dim": 24, "vision_cfg": {**_NATIVE, "ls_init_value": 0.1}},
    "small-clipa": {
        "embed_dim": 24,
        "vision_cfg": {**_NATIVE, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
    },
    "small-coca": {
        "embed_dim": 24,
        "multimodal_cfg": _MULTIMODAL,
        "vision_cfg": {**_NATIVE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "custom_text": True,
    },
    "small-siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": _timm("test_siglip", 64, "map", "none"),
        "text_cfg": {**TEXT, **_SIGLIP},
    },
    "small-siglip2": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": _timm("test_siglip", 64, "map", "none"),
        "text_cfg": {**TEXT, **_SIGLIP, "act_kwargs": {"approximate": "tanh"}},
    },
    "small-eva01": {"embed_dim": 24, "custom_text": True, "vision_cfg": _timm("test_eva01", 56)},
    "small-eva02": {"embed_dim": 24, "custom_text": True, "vision_cfg": _timm("test_eva02", 64)},
    "small-eva02-e": {"embed_dim": 24, "custom_text": True, "vision_cfg": _timm("test_eva02_e", 56)},
    "small-pe": {"embed_dim": 24, "custom_text": True, "vision_cfg": _timm("test_pe", 64, "map")},
    "small-gap": {"embed_dim": 24, "vision_cfg": _timm("test_gap", 64, "", "linear")},
}
"""As, in this order: ViT-B-16, ViT-B-16-quickgelu, none (an oblong image), ViT-M-16-alt, ViT-L-14-CLIPA,
coca_ViT-B-32, ViT-B-16-SigLIP, ViT-B-16-SigLIP2, EVA01-g-14, EVA02-B-16, EVA02-E-14-plus, PE-Core-B-16,
vit_medium_patch16_gap_256."""


def register(folder: Path) -> None:
    """Let open_clip know the towers; the folder keeps their configurations."""
    for name, config in TOWERS.items():
        (folder / f"{name}.json").write_text(json.dumps({"text_cfg": TEXT, **config}))
    open_clip.add_model_config(folder)


def tuned(name: str, **options) -> CLIPViT:
    """A tower with LoRA that changes its embeddings, and norms, biases and scales off their first values."""
    torch.manual_seed(0)
    backbone = CLIPViT.from_open_clip(name, **options)
    if not options.get("pretrained"):
        randomise(backbone.base_clip())
    lora.inject(backbone, rank=2, alpha=2.0)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B, std=0.2)
    return backbone.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move every parameter off its first value."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.02))


def pictures(backbone: CLIPViT) -> torch.Tensor:
    """Two images of a tower's own size."""
    return torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether embeddings are alike."""
    assert left.shape == right.shape
    return bool((left - right).norm() <= tolerance * right.norm())


def read_here(reader: str, task: Path) -> Any:
    """As `verification.read`, in this process: the reader's script as it is.

    Raises:
        ExportError: it fails.
    """
    output, scope = io.StringIO(), {"__name__": "reader"}
    try:
        with contextlib.redirect_stdout(output), torch.autocast("cpu", enabled=False):
            exec(compile(verification.READER.read_text(), reader, "exec"), scope)
            scope["main"](str(task))
    except (Exception, SystemExit) as error:
        raise ExportError(f"{reader} does not load the export: {error}") from error
    return json.loads(output.getvalue().strip().splitlines()[-1])


def informed_reader(folder: Path) -> Path:
    """The reader's script, told of timm's small models first: what a process without us would lack."""
    path = folder / "reader.py"
    models = (HERE / "timm_models.py").read_text()  # with names of its own
    path.write_text(f"exec({models!r}, {{'__name__': '__main__'}})\n{verification.READER.read_text()}")
    return path
