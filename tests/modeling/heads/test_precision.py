"""Heads under autocast against heads in float32, on the same features: losses, matching, predictions.

`pytest tests/modeling/heads/test_precision.py -s` prints, for each head and type, the largest relative difference
of a loss, and how many pairs of the matching are others.
"""

import pytest
import small_rcnn
import torch
from detectron2.structures import Instances
from query_heads import inputs
from torch.nn import functional as F

from visft.modeling.backbone import CLIPViT
from visft.modeling.heads import (
    CaptionHead,
    DETRHead,
    HeadInputs,
    LabelSpace,
    Mask2FormerHead,
    RegionTextHead,
    TransformerCaptionHead,
    Vocabulary,
)
from visft.modeling.heads.common.losses import generalized_iou
from visft.modeling.heads.common.region_pooling import pool
from visft.modeling.heads.detr import detr_head
from visft.modeling.heads.mask2former import mask2former_head
from visft.modeling.open_vocabulary import overlaps
from visft.modeling.tower_losses.base import cosine_distance
from visft.modeling.tower_losses.contrastive import symmetric_loss

DTYPES = [torch.float16, torch.bfloat16]
CAPTIONS = {"grid": 4, "max_length": 8, "beam_size": 1}
CHANNELS, SIZE, WORDS = 192, (64, 64), ("a", "red", "dog", "on", "grass")
QUERIES = {"num_queries": 20, "encoder_layers": 1, "decoder_layers": 3}


def region_text() -> torch.nn.Module:
    head = RegionTextHead(names=[(name,) for name in ("dog", "bird", "cup", "knife", "car")])
    head.bind(CLIPViT.from_open_clip("visft-tiny", "demo").eval())
    return head


HEADS = {
    "DETR": lambda: DETRHead(in_channels=CHANNELS, labels=LabelSpace(5), **QUERIES),
    "DETR, sigmoid": lambda: DETRHead(
        in_channels=CHANNELS, labels=LabelSpace(5), class_loss="sigmoid", **QUERIES
    ),
    "Mask2Former": lambda: Mask2FormerHead(in_channels=CHANNELS, labels=LabelSpace(5), **QUERIES),
    "caption, LSTM": lambda: CaptionHead(in_channels=CHANNELS, vocabulary=Vocabulary(WORDS), **CAPTIONS),
    "caption, Transformer": lambda: TransformerCaptionHead(
        in_channels=CHANNELS, vocabulary=Vocabulary(WORDS), **CAPTIONS
    ),
    "R-CNN": lambda: small_rcnn.build(CHANNELS, 8, MODEL__VISFT__DETECTION__NUM_CLASSES=5),
    "region text": region_text,
}


@pytest.fixture
def labelled(images) -> list[dict]:
    captions = ["a dog", "a red dog on grass", "grass", "a dog on a red dog on grass"]
    return [
        image | {"captions": [c]}
        for image, c in zip(images, captions, strict=True)
        if len(image["instances"])
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_under_autocast_is_near_one_in_float32(name, dtype, labelled, monkeypatch):
    torch.manual_seed(0)
    head, features = HEADS[name]().eval(), torch.randn(3, CHANNELS, 8, 8)
    given = (torch.zeros(3, 8, 8, dtype=torch.bool), labelled, [SIZE] * 3, SIZE)
    matchings = []
    for module in (detr_head, mask2former_head):
        match = module.match
        monkeypatch.setattr(
            module, "match", lambda costs, match=match: matchings.append(match(costs)) or matchings[-1]
        )

    def computed() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        head.draw()
        losses = head.losses(HeadInputs(features, *given), head.normalizers(labelled))
        with torch.no_grad():
            head.inference(HeadInputs(features, *given))
        return losses

    expected = computed()
    with torch.autocast("cpu", dtype):
        found = computed()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in found.values())
    worst = max(abs(found[key].item() / loss.item() - 1) for key, loss in expected.items())
    changed = 0
    if matchings:
        first, second = ((m.query, m.target) for m in matchings)
        changed = int(sum((a != b).sum() for a, b in zip(first, second, strict=True)))
    pairs = f"{changed} of {matchings[0].query.numel()}" if matchings else ""
    print(f"{name:<22}{str(dtype).removeprefix('torch.'):<10}{worst:9.1e}  {pairs}")
    assert worst < (0.002 if dtype == torch.float16 else 0.02)


def full_masks() -> Instances:
    """Two masks that share 39,999 pixels, a number that half precision rounds."""
    masks = torch.zeros(2, 300, 300, dtype=torch.bool)
    masks[0, :, :201], masks[1, :199] = True, True
    return Instances((300, 300), pred_masks=masks)


def contrastive() -> torch.Tensor:
    images, texts = (F.normalize(torch.randn(6, 64), dim=-1) for _ in range(2))
    tokens = torch.arange(6)[:, None]
    return symmetric_loss((images, texts, tokens), [images, texts, tokens], 0, 100.0)


FORMULAS = {
    "mean features of regions": lambda: pool(torch.randn(8, 16, 16) + 3, torch.rand(5, 16, 16)),
    "overlaps of masks": lambda: overlaps(full_masks()),
    "GIoU": lambda: generalized_iou(torch.rand(9, 4), torch.rand(9, 4)),
    "cosine distance": lambda: cosine_distance(torch.randn(9, 64), torch.randn(9, 64)),
    "contrastive loss": contrastive,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_the_same_under_autocast(name, dtype):
    torch.manual_seed(0)
    expected = FORMULAS[name]()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        found = FORMULAS[name]()
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_boxes_are_matched_alike_under_autocast(kind, dtype, labelled):
    """The same predictions: the same pairs and losses, bit by bit. Of masks see test_mask2former.py."""
    torch.manual_seed(0)
    head = DETRHead(in_channels=CHANNELS, labels=LabelSpace(5), class_loss=kind, **QUERIES).eval()
    given = inputs(torch.randn(3, CHANNELS, 8, 8), labelled, SIZE)
    output, targets = head.predictions(given), head.targets(given)

    def computed() -> tuple:
        matching = head.match(output, targets)
        return matching, head.criterion(output, targets, matching, head.normalizers(labelled))

    expected, losses = computed()
    with torch.autocast("cpu", dtype):
        matching, rough = computed()
    assert torch.equal(matching.query, expected.query) and torch.equal(matching.target, expected.target)
    assert all(torch.equal(rough[key], loss) for key, loss in losses.items())
