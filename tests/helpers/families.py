"""Small random instances of every flavour of vision tower in open_clip, made by shrinking its own configurations."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import timm
import torch

from visft.modeling.backbone import open_clip_models

NATIVE = (
    "ViT-B-32",
    "ViT-B-16-quickgelu",
    "ViT-L-14-336-quickgelu",
    "ViT-M-16-alt",
    "ViT-S-32-alt",
    "ViT-B-16-plus-240",
    "ViT-H-14-378",
    "ViT-L-14-worldwide",
    "ViT-L-14-CLIPA",
    "coca_ViT-B-32",
    "coca_base",
    "nllb-clip-base",
)
TIMM = (
    "ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP-384",
    "ViT-B-16-SigLIP2-256",
    "ViT-gopt-16-SigLIP2-256",
    "nllb-clip-base-siglip",
    "EVA01-g-14",
    "EVA02-B-16",
    "EVA02-L-14",
    "EVA02-E-14-plus",
    "PE-Core-B-16",
    "PE-Core-L-14-336",
    "PE-Core-bigG-14-448",
    "MobileCLIP2-L-14",
    "vit_medium_patch16_gap_256",
)
REFUSED = (
    "RN50",
    "convnext_base",
    "ViTamin-S",
    "MobileCLIP-B",
    "MobileCLIP-S1",
    "swin_base_patch4_window7_224",
    "vit_relpos_medium_patch16_cls_224",
)
DEPTH, WIDTH, GRID = 3, 64, 4


@contextlib.contextmanager
def shrunk(name: str, depth: int = DEPTH) -> Iterator[str]:
    """Within the block open_clip can build the architecture with `depth` blocks of width 64 on a grid of 4 x 4 patches,
    under the name that is given."""
    open_clip = open_clip_models.open_clip()
    config = open_clip.get_model_config(name)
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    config |= {"embed_dim": 32, "text_cfg": text}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = text
    vision = config["vision_cfg"]

    def create(timm_name, **options):
        patch = int(timm_name.split("patch")[1].split("_")[0])
        # A side that the patch does not divide stays one, as that of SO400M/14 at 384 pixels.
        rest = vision["image_size"] % patch
        size = {"img_size": GRID * patch + rest, "embed_dim": WIDTH, "depth": depth, "num_heads": 4}
        return real_create(timm_name, **(options | size))

    if "timm_model_name" not in vision:
        vision |= {
            "width": WIDTH,
            "layers": depth,
            "head_width": 16,
            "image_size": GRID * vision["patch_size"],
        }
    real_create = timm.create_model
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(timm, "create_model", create):
        file = Path(folder) / f"small-{name}.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        yield file.stem


def small_clip(name: str, depth: int = DEPTH, seed: int = 0) -> torch.nn.Module:
    """A small CLIP (see `shrunk`), all weights random, in evaluation mode."""
    torch.manual_seed(seed)
    with shrunk(name, depth) as small:
        model = open_clip_models.open_clip().create_model(small).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value: norms off 1, biases and LayerScale off 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "gamma" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.02)


def images_for(model: torch.nn.Module, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random normalised images of the tower's native size."""
    trunk = getattr(model.visual, "trunk", None)
    size = trunk.patch_embed.img_size if trunk is not None else model.visual.image_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest entry of `b`."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max()).item()
