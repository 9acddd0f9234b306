"""Augmented views of single emoji. The demo tower is pretrained and evaluated on them."""

import math

import torch
import torch.nn.functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def premultiplied(images: torch.Tensor, size: int) -> torch.Tensor:
    """Convert RGBA `[N, S, S, 4]` uint8 with straight alpha to `[N, 4, size, size]` uint8 with premultiplied alpha.

    With straight alpha, resampling and warping would blend transparent black into the edges.
    """
    out = torch.empty(len(images), 4, size, size, dtype=torch.uint8)
    for start in range(0, len(images), 256):
        rgba = images[start : start + 256].permute(0, 3, 1, 2).float() / 255
        rgba[:, :3] *= rgba[:, 3:]
        if rgba.shape[-1] != size:
            rgba = F.interpolate(
                rgba, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
        out[start : start + 256] = (rgba * 255).round().to(torch.uint8)
    return out


def _warp(
    rgba: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, flip: torch.Tensor, generator
) -> torch.Tensor:
    """Rotate, squeeze and shear images at random, at a given scale (share of the frame) and shift (in frames)."""
    n, size = len(rgba), rgba.shape[-1]
    if n == 0:
        return rgba  # affine_grid refuses an empty batch
    angle = (torch.rand(n, generator=generator) - 0.5) * math.radians(50)
    aspect = torch.exp((torch.rand(n, generator=generator) - 0.5) * 0.4)
    shear = (torch.rand(n, generator=generator) - 0.5) * 0.3
    cos, sin = torch.cos(angle), torch.sin(angle)
    # The inverse map, from the frame to the image, undoes the shift, then the rotation, then the scale.
    a = torch.stack([cos, sin, -sin, cos], 1).view(n, 2, 2)
    squeeze = torch.zeros(n, 2, 2)
    squeeze[:, 0, 0] = torch.where(flip, -1.0, 1.0) / (scale * aspect.sqrt())
    squeeze[:, 0, 1] = shear / scale
    squeeze[:, 1, 1] = aspect.sqrt() / scale
    linear = squeeze @ a
    theta = torch.cat([linear, -(linear @ (2 * shift).unsqueeze(2))], 2)
    grid = F.affine_grid(theta, [n, 4, size, size], align_corners=False)
    return F.grid_sample(rgba, grid, align_corners=False)


def _hue_rotation(angle: torch.Tensor, saturation: torch.Tensor) -> torch.Tensor:
    """Return colour matrices `[N, 3, 3]`: saturation, then rotation about the grey axis (Rodrigues' formula)."""
    n = len(angle)
    cos, sin = torch.cos(angle).view(n, 1, 1), torch.sin(angle).view(n, 1, 1)
    ones = torch.full((3, 3), 1 / 3)
    k = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    rotation = cos * torch.eye(3) + (1 - cos) * ones + sin * k
    return rotation @ (ones + saturation.view(n, 1, 1) * (torch.eye(3) - ones))


def backgrounds(n: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Return random backgrounds `[N, 3, height, width]` in 0..1: plain, gradient, clouds, stripes, checks or dots."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    y = torch.linspace(-1, 1, height).view(1, height, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, width)
    angle = uniform(n, 1, 1) * 2 * math.pi
    along = x * torch.cos(angle) + y * torch.sin(angle)
    across = y * torch.cos(angle) - x * torch.sin(angle)
    frequency, phase = 3 + 12 * uniform(n, 1, 1), uniform(n, 1, 1) * 2 * math.pi
    u, v = torch.sin(frequency * along + phase), torch.sin(frequency * across + phase)
    coarse = F.interpolate(uniform(n, 1, 4, 4), size=(height, width), mode="bicubic", align_corners=False)[
        :, 0
    ]
    fine = F.interpolate(uniform(n, 1, 12, 12), size=(height, width), mode="bilinear", align_corners=False)[
        :, 0
    ]
    kinds = torch.stack(
        [
            torch.zeros(n, height, width),
            (along / 2.8 + 0.5),
            0.6 * coarse + 0.4 * fine,
            0.5 + 0.5 * u,
            (0.5 + 2 * u * v).clamp(0, 1),
            ((u + v) - 0.9).clamp(0, 1),
        ]
    )
    kind = torch.randint(len(kinds), (n,), generator=generator)
    blend = kinds[kind, torch.arange(n)].unsqueeze(1)
    first, second = uniform(n, 3, 1, 1), uniform(n, 3, 1, 1)
    # Half of them are gentle: their second colour is near the first.
    second = torch.where(uniform(n, 1, 1, 1) < 0.5, first + 0.3 * (second - 0.5), second)
    return (first + (second - first) * blend).clamp_(0, 1)


def augmented_views(
    bank: torch.Tensor, index: torch.Tensor, flippable: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return one augmented view of each wanted image, normalised for the tower.

    Args:
        bank: `[N, 4, S, S]` uint8, premultiplied RGBA (`premultiplied`).
        index: `[B]` int64, indices into `bank`.
        flippable: `[N]` bool, see `catalogue.may_flip`.
        generator: the only source of randomness.

    Returns:
        `[B, 3, S, S]` float, CLIP-normalised.
    """
    n, size = len(index), bank.shape[-1]

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    image = backgrounds(n, size, size, generator)
    # Clutter: a second, smaller emoji behind the first, near a corner.
    cluttered = (uniform(n) < 0.2).nonzero()[:, 0]
    other = torch.randint(len(bank), (len(cluttered),), generator=generator)
    corner = (torch.randint(0, 2, (len(cluttered), 2), generator=generator) - 0.5) * 0.7
    behind = _warp(
        bank[other].float() / 255,
        0.2 + 0.2 * uniform(len(other)),
        corner,
        uniform(len(other)) < 0.5,
        generator,
    )
    image[cluttered] = behind[:, :3] + image[cluttered] * (1 - behind[:, 3:])

    scale = 0.5 + 0.6 * uniform(n)
    # This shift keeps most of the image inside the frame.
    shift = (uniform(n, 2) - 0.5) * (1.08 - scale).clamp(min=0.06).unsqueeze(1)
    flip = (uniform(n) < 0.5) & flippable[index]
    front = _warp(bank[index].float() / 255, scale, shift, flip, generator)
    colours, alpha = front[:, :3], front[:, 3:]
    hue = torch.where(uniform(n) < 0.3, 0.8 * (uniform(n) - 0.5), 0.15 * (uniform(n) - 0.5))
    colours = torch.einsum("nij,njhw->nihw", _hue_rotation(hue, 0.7 + 0.6 * uniform(n)), colours)
    image = colours + image * (1 - alpha)

    contrast, brightness = 0.75 + 0.5 * uniform(n, 1, 1, 1), 0.25 * (uniform(n, 1, 1, 1) - 0.5)
    image = (image - 0.5) * contrast + 0.5 + brightness
    blurred = (uniform(n) < 0.15).nonzero()[:, 0]
    image[blurred] = F.avg_pool2d(F.pad(image[blurred], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = 0.06 * uniform(n, 1, 1, 1) * (uniform(n, 1, 1, 1) < 0.5)
    image = image + noise * torch.randn(image.shape, generator=generator)
    return normalise(image.clamp_(0, 1))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise RGB `[N, 3, H, W]` in 0..1 as CLIP does."""
    return (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
