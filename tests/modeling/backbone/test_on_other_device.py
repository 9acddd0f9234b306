"""Towers on another device than the CPU: nothing is forgotten on it, and what comes out is the same."""

import pytest
import torch
from families import NATIVE, TIMM, images_for, relative, small_clip
from other_device import DEVICE, other_device

from visft.applications.compared_towers import load
from visft.modeling.backbone import CLIPViT, lora


@pytest.mark.parametrize("name", NATIVE + TIMM)
def test_map_embedding_gradients_and_merge_are_those_of_the_cpu(name):
    """At the native size, and at another with windows, through LoRA."""
    clip = small_clip(name)
    images = images_for(clip)
    backbone = CLIPViT(clip.visual, window_size=3)
    lora.inject(backbone, rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2"))

    def adapters() -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in backbone.named_parameters() if "lora_" in name]

    for parameter in adapters():
        torch.nn.init.normal_(parameter, std=0.1)

    def outputs(pictures: torch.Tensor) -> list[torch.Tensor]:
        found, embedding = backbone.map_and_embedding(pictures)
        larger = backbone(torch.nn.functional.interpolate(pictures, scale_factor=(2, 3)))["last_feat"]
        gradients = torch.autograd.grad(larger.square().mean(), adapters())
        lora.merge(backbone)
        merged = backbone.image_embedding(pictures)
        lora.unmerge(backbone)
        return [tensor.detach() for tensor in (found, embedding, larger, merged, *gradients)]

    expected = outputs(images)
    with other_device() as device:
        clip.to(device)
        found = outputs(images.to(device))
        assert all(
            tensor.device.type == DEVICE.type for tensor in [*found, *clip.visual.state_dict().values()]
        )
        found = [tensor.cpu() for tensor in found]
    assert max(relative(*pair) for pair in zip(found, expected, strict=True)) < 1e-3


def test_a_tower_of_the_benchmarks():
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    lines = ["a cat", "a dog on a blue background"]
    tower = load("visft-tiny", "demo", device="cpu")
    expected = [*tower.encode(images, dense=True), tower.text(lines)]
    with other_device() as device:
        tower = load("visft-tiny", "demo", device=device.type)
        found = [*tower.encode(images, dense=True), tower.text(lines)]
    assert all(tensor.device.type == "cpu" for tensor in found)
    assert max(relative(*pair) for pair in zip(found, expected, strict=True)) < 1e-4
