"""The authors' numbers, from their weights. `VISFT_GOLDEN_DIR` names another pack of the same format."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import golden  # noqa: E402

from visft.backbone import lora  # noqa: E402


@pytest.fixture(params=golden.FLAVOURS, scope="module")
def pack(request) -> golden.Pack:
    return golden.Pack(request.param)


def test_the_pack_has_flavours():
    assert golden.FLAVOURS, f"no *.json in {golden.FOLDER}"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# The tower and LoRA


def test_features_without_lora(pack):
    features = pack.backbone(with_lora=False)(pack.batch())["last_feat"]
    assert difference(features, pack.tensors["features_without_lora"]) < 1e-4


def test_features_with_lora(pack):
    expected = pack.tensors["features"]
    assert difference(expected, pack.tensors["features_without_lora"]) > 1e-2, "LoRA would not be tested"
    with torch.no_grad():
        features = pack.backbone()(pack.batch())["last_feat"]
    assert difference(features, expected) < 1e-4


def test_features_with_lora_merged(pack):
    backbone = lora.merge(pack.backbone())
    with torch.no_grad():
        features = backbone(pack.batch())["last_feat"]
    assert difference(features, pack.tensors["features"]) < 1e-4


# Detection, segmentation and their gradients follow
