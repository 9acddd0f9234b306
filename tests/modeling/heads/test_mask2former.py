"""Mask2Former as a head: batches, kinds of masks, losses at points, predictions. Its numbers are in test_golden.py."""

import pytest
import torch
from annotated_images import annotated, rectangles
from detectron2.structures import BitMasks, PolygonMasks
from query_heads import gradients, inputs, losses, maps, mask2former
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import masks_to_boxes

from visft.errors import ConfigError
from visft.modeling.heads.common import losses as formulas
from visft.modeling.heads.mask2former import mask2former_head
from visft.modeling.heads.mask2former.mask2former_head import MaskOutput, _sample_targets, tight_boxes
from visft.modeling.heads.mask2former.mask_decoder import MaskDecoder

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def test_points_follow_the_seed_and_the_image(images):
    head, features = mask2former(), maps(4, 8)
    a, b, c = (losses(head, features, images, seed=seed) for seed in (1, 1, 2))
    assert a["loss_mask"] == b["loss_mask"] != c["loss_mask"]
    torch.manual_seed(1)
    points = head._random_points(images, torch.device("cpu"))
    assert not torch.equal(points[0], points[1])
    assert 0 <= torch.stack(points).min() < torch.stack(points).max() < 1


def test_losses_at_random_points_are_their_formulas(images):
    """Without important points: every mask is compared at the last `num_points` of its picture's points."""
    head = mask2former(importance_ratio=0.0, class_weight=1.5, mask_weight=4.0, dice_weight=3.0)
    features = maps(4, 8)
    found = losses(head, features, images)
    torch.manual_seed(3)
    output, targets = head(features), head.targets(inputs(features, images))
    points, matching = targets.points, head.match(output, targets)
    for layer, suffix in ((0, "_0"), (1, "_1"), (2, "")):
        mask_sum = dice_sum = 0
        target, weight = torch.full((4, 6), 5), torch.full((4, 6), 0.1)
        for n, q, t in zip(matching.image, matching.query[layer], matching.target[layer], strict=True):
            grid = 2 * points[n][None, None, -64:] - 1
            bits = images[n]["instances"].gt_masks.tensor[t].float()
            truth = F.grid_sample(bits[None, None], grid, align_corners=False).flatten()
            logits = F.grid_sample(output.masks[layer, n, q][None, None], grid, align_corners=False).flatten()
            p = logits.sigmoid()
            mask_sum += F.binary_cross_entropy(p, truth)
            dice_sum += 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
            target[n, q], weight[n, q] = images[n]["instances"].gt_classes[t], 1.0
        ce = F.cross_entropy(output.logits[layer].flatten(0, 1), target.flatten(), reduction="none")
        torch.testing.assert_close(found["loss_mask" + suffix], 4 * mask_sum / 9)
        torch.testing.assert_close(found["loss_dice" + suffix], 3 * dice_sum / 9)
        expected = 1.5 * (ce * weight.flatten()).sum() / weight.sum()
        torch.testing.assert_close(found["loss_ce" + suffix], expected)


def test_the_most_uncertain_candidates_are_compared():
    head = mask2former(num_points=8, oversample_ratio=3.0, importance_ratio=0.75)
    masks, points = torch.randn(6, 5, 7), torch.rand(24 + 2, 2)  # candidates, then random points
    chosen = head._choose(masks, points)
    assert chosen.shape == (6, 8)
    values = F.grid_sample(
        masks[:, None], (2 * points[None, None] - 1).expand(6, -1, -1, -1), align_corners=False
    )
    for indices, value in zip(chosen.tolist(), values[:, 0, 0], strict=True):
        assert set(indices[:6]) == set(value[:24].abs().argsort()[:6].tolist())
        assert indices[6:] == [24, 25]


def test_masks_a_few_at_a_time_are_masks_all_at_once(images, monkeypatch):
    head, features = mask2former(), maps(4, 8)
    expected = losses(head, features, images)
    wanted = gradients(head, expected)
    monkeypatch.setattr(mask2former_head, "_CHUNK", 2)
    monkeypatch.setattr(mask2former_head, "rows_at_once", lambda length, device: 2)
    monkeypatch.setattr(formulas, "rows_at_once", lambda length, device: 4)
    found = losses(head, features, images)
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name])
    for name, gradient in gradients(head, found).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor of floats has that is made within it."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *(leaf.numel() for leaf in made if leaf.is_floating_point())])
        return result


@pytest.mark.parametrize("polygons", [False, True])
def test_hundreds_of_masks_are_never_floats_all_at_once(polygons):
    size, count = (256, 256), 150
    boxes = [[i, i, i + 90, i + 60] for i in range(count)]
    image = annotated(0, size, boxes, [i % 5 for i in range(count)])
    if polygons:
        corners = [[torch.tensor([a, b, c, b, c, d, a, d]).double().numpy()] for a, b, c, d in boxes]
        image["instances"].gt_masks = PolygonMasks(corners)
    head, features = mask2former(num_points=256), maps(1, 8)
    normalizers = head.normalizers([image])
    with Largest() as seen:
        sum(head.losses(inputs(features, [image], size), normalizers).values()).backward()
    points = 256 + 768 + 64
    assert seen.numbers == count * points < count * size[0] * size[1] // 50


def test_bitmaps_polygons_and_tensors_are_the_same(images):
    head, features = mask2former(), maps(4, 8)
    expected = losses(head, features, images)
    bits = [image["instances"].gt_masks.tensor for image in images]
    polygons = [
        [
            [torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).double().numpy()]
            for x0, y0, x1, y1 in boxes.tolist()
        ]
        for boxes in (image["instances"].gt_boxes.tensor for image in images)
    ]
    for kind in (bits, [PolygonMasks(p) for p in polygons]):
        for image, masks in zip(images, kind, strict=True):
            image["instances"].gt_masks = masks
        found = losses(head, features, images)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padding_is_outside_of_every_mask():
    """Sampling a picture's masks is sampling them padded to the batch."""
    image, points = annotated(0, (40, 48), [[0, 0, 48, 40], [7, 3, 48, 30]], [0, 1]), torch.rand(500, 2)
    padded = F.pad(image["instances"].gt_masks.tensor.float(), (0, 16, 0, 24))
    expected = F.grid_sample(padded[None], 2 * points[None, None] - 1, align_corners=False)[0, :, 0]
    torch.testing.assert_close(_sample_targets(image, points, (64, 64)), expected, atol=1e-4, rtol=1e-4)
    assert (expected == 0).any() and (expected == 1).any()


def test_a_query_looks_inside_its_mask_or_everywhere():
    masks = torch.tensor([[[[1.0, -1.0], [0.5, -2.0]], [[-1.0, -1.0], [-1.0, -1.0]]]])
    expected = torch.tensor([[[[True, False, True, False], [True] * 4]]])
    assert torch.equal(MaskDecoder._allowed(masks), expected)


def test_no_gradient_through_the_attention_mask():
    masks = torch.randn(1, 2, 3, 3, requires_grad=True)
    assert not MaskDecoder._allowed(masks).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_an_image_by_heart_and_finds_it_in_original_coordinates(device):
    size, boxes, classes = (48, 64), [[8, 8, 24, 40], [32, 8, 64, 24]], [3, 1]
    image = [annotated(0, size, boxes, classes)]
    head = mask2former().to(device)
    given = inputs(torch.randn(1, 12, 8, 8, device=device), image)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        sum(head.losses(given, head.normalizers(image)).values()).backward()
        optimizer.step()
    with torch.no_grad():
        result = head.eval().inference(given)[0].to("cpu")
    assert result.image_size == (96, 128)
    assert result.pred_masks.dtype == torch.bool and result.pred_masks.shape[1:] == (96, 128)
    best = result[result.scores > 0.5]
    truth = rectangles(2 * torch.tensor(boxes), (96, 128))
    both = (truth[:, None] & best.pred_masks[None]).sum((2, 3)).float()
    iou = both / (truth[:, None] | best.pred_masks[None]).sum((2, 3))
    assert len(best) == 2 and iou.max(1).values.min() > 0.8
    assert best.pred_classes[iou.argmax(1)].tolist() == classes


def test_predictions_are_tight_scored_and_limited(images):
    head, features = mask2former(max_detections=9).eval(), 3 * maps(4, 8)
    with torch.no_grad():
        results = head.inference(inputs(features, images))
        output = head(features)
    assert any(len(result) for result in results)
    for n, result in enumerate(results):
        assert len(result) <= 9 and result.pred_masks.flatten(1).any(1).all()
        inclusive = masks_to_boxes(result.pred_masks)
        inclusive[:, 2:] += 1
        assert torch.equal(result.pred_boxes.tensor, inclusive)
        # Of the best pair of query and class, unless its mask is empty.
        probability = output.logits[-1, n].softmax(-1)[:, :5]
        query, best = divmod(probability.argmax().item(), 5)
        large = F.interpolate(output.masks[-1:, n], (64, 64), mode="bilinear")
        large = F.interpolate(large, (128, 128), mode="bilinear")[0, query]
        if (large > 0).any():
            score = probability[query, best] * large.sigmoid()[large > 0].mean()
            torch.testing.assert_close(result.scores[0], score)
            assert result.pred_classes[0] == best and torch.equal(result.pred_masks[0], large > 0)


def test_tight_boxes_are_detectron2s():
    masks = torch.rand(20, 13, 17) > 0.97
    masks[0] = False
    assert torch.equal(tight_boxes(masks), BitMasks(masks).get_bounding_boxes().tensor)


def test_no_mask_at_all_is_an_empty_prediction(images):
    head = mask2former().eval()
    for parameter in head.predictor.mask_embed.parameters():
        torch.nn.init.zeros_(parameter)
    result = head.inference(inputs(maps(4, 8), images))[0]
    assert len(result) == 0 and result.pred_masks.shape == (0, 128, 128) and len(result.pred_boxes) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matching_and_losses_are_exact_under_autocast(dtype):
    """As many points as the paper has, masks that are full and sure: their sums overflow in float16."""
    head = mask2former(num_queries=40, num_points=12544)
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 3, 40, 16, 16, generator=generator) * 4 + 12
    output = MaskOutput(torch.randn(2, 3, 40, 6, generator=generator), masks)
    images = [
        annotated(i, (64, 64), [[0, 0, 64, 64], [i, 2, 40, 60], [8, 8 + i, 62, 64]], [i, 1, 4])
        for i in range(3)
    ]
    targets = head.targets(inputs(maps(3), images))
    normalizers = head.normalizers(images)

    def computed() -> tuple:
        matching = head.match(output, targets)
        return matching, head.criterion(output, targets, matching, normalizers)

    expected, exact = computed()
    with torch.autocast("cpu", dtype):
        matching, rough = computed()
    assert torch.equal(matching.query, expected.query) and torch.equal(matching.target, expected.target)
    assert all(torch.equal(rough[name], loss) and loss.isfinite() for name, loss in exact.items())


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="IMPORTANCE_RATIO 1.5"):
        mask2former(importance_ratio=1.5)
    with pytest.raises(ConfigError, match="DIM is 40"):
        mask2former(dim=40)
