"""Proposals, one a query whatever its class, against what inference finds."""

import pytest
import torch
from annotated_images import annotated
from query_heads import detr, mask2former
from torch.nn import functional as F

from visft.modeling.heads import DETRHead, HeadInputs, LabelSpace, Mask2FormerHead

LABELS = [LabelSpace(5), LabelSpace(9, dataset_ids=(1, 4, 8))]
SIZES, PADDED = [(64, 48), (40, 64)], (64, 64)


def detector(**options) -> DETRHead:
    return detr(**options).eval()


def segmenter(**options) -> Mask2FormerHead:
    return mask2former(**options).eval()


def arguments() -> HeadInputs:
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, :, :3], mask[1, :3] = False, False
    images = [annotated(i, size, [], []) for i, size in enumerate(SIZES)]
    return HeadInputs(torch.randn(2, 12, 4, 4), mask, images, SIZES, PADDED)


@pytest.mark.parametrize("labels", LABELS, ids=["contiguous", "dataset_id"])
@pytest.mark.parametrize("class_loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("make", [detector, segmenter])
@torch.no_grad()
def test_each_detection_is_a_proposal_that_is_as_sure_of_an_object(make, class_loss, labels):
    head, given = make(labels=labels, class_loss=class_loss), arguments()
    for found, proposed in zip(head.inference(given), head.proposals(given), strict=True):
        fields = set(found.get_fields()) - {"scores", "pred_classes"} | {"objectness"}
        assert set(proposed.get_fields()) == fields
        assert 0 < len(proposed) <= 6 and proposed.image_size == found.image_size
        same = (found.pred_boxes.tensor[:, None] == proposed.pred_boxes.tensor[None]).all(-1)
        if proposed.has("pred_masks"):
            same &= (found.pred_masks[:, None] == proposed.pred_masks[None]).flatten(2).all(-1)
        assert same.any(1).all(), "a detection that is no proposal"
        sure = (same * proposed.objectness).max(1).values
        assert (sure >= found.scores - 1e-6).all()
        if class_loss == "sigmoid":  # the best class of a query is all that its objectness is
            torch.testing.assert_close(found.scores.max(), proposed.objectness.max())
        else:
            assert (sure > found.scores + 1e-4).any()


@pytest.mark.parametrize("make", [detector, segmenter])
@torch.no_grad()
def test_objectness_is_its_formula(make):
    head, given = make(labels=LABELS[0]), arguments()
    if make is detector:
        output = head(given.features, given.padding_mask)
        expected = output.logits[-1].softmax(-1)[..., :5].sum(-1)
    else:
        output = head(given.features)
        logits = F.interpolate(output.masks[-1], PADDED, mode="bilinear", align_corners=False)
        expected = []
        for maps, scores, (h, w) in zip(logits, output.logits[-1].softmax(-1), SIZES, strict=True):
            maps = F.interpolate(maps[None, :, :h, :w], (2 * h, 2 * w), mode="bilinear", align_corners=False)
            quality = torch.stack([m[m > 0].sigmoid().mean() for m in maps[0]])
            expected.append((scores[:, :5].sum(-1) * quality)[~quality.isnan()])
    for own, proposed in zip(expected, head.proposals(given), strict=True):
        torch.testing.assert_close(proposed.objectness, own, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_query_without_a_mask_proposes_nothing():
    head, given = segmenter(labels=LABELS[0]), arguments()
    head.pixel_decoder.mask_features.weight.zero_()
    head.pixel_decoder.mask_features.bias.zero_()
    for proposed in head.proposals(given):
        assert len(proposed) == 0 and proposed.pred_masks.shape[1:] == proposed.image_size
