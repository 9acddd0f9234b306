"""Models with objectives, and what they are compared with: open_clip's own base."""

import copy

import torch
from demo_models import build, picture

from visft.modeling.meta_arch import ViSFT

CAPTIONS = ("a red cup", "two dogs", "the moon over a lake", "a bus")
NATIVE = 64  # of visft-tiny


def with_objectives(
    *names: str, options=(), stages=("lora",), heads=("detection",), tuned: bool = True
) -> ViSFT:
    """visft-tiny with random weights and LoRA, away from zero if `tuned`, in training mode."""
    model = build(
        *("VISFT.STAGES", stages, "MODEL.VISFT.OBJECTIVES", names, "MODEL.VISFT.HEADS", heads, *options)
    )
    if tuned:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2, generator=generator)
    return model.train()


def base_of(*options) -> torch.nn.Module:
    """The base CLIP of `with_objectives`, as open_clip makes it of the same seed, untouched."""
    model = build("VISFT.STAGES", ("heads",), *options)
    return copy.deepcopy(model.backbone.base_clip()).eval()


def captioned(count: int = 3, size=(NATIVE, NATIVE)) -> list[dict]:
    """Pictures with one caption each."""
    return [picture(size, number=i) | {"captions": [CAPTIONS[i % len(CAPTIONS)]]} for i in range(count)]


def normalised(image: torch.Tensor) -> torch.Tensor:
    """An image `[3, H, W]`, 0..255, as CLIP sees it."""
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    return (image.float() / 255 - mean) / std


def gradients(model: ViSFT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of what trains."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    """Gradients, each relative to its own size."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-9, name
