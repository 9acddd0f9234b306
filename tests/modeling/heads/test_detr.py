"""DETR as a head: batches, labels, losses and predictions. Its numbers are in test_golden.py."""

import copy

import pytest
import torch
from annotated_images import annotated
from detectron2.structures import Boxes, pairwise_iou
from query_heads import detr, inputs, losses, maps
from torch.nn import functional as F

from visft.errors import ConfigError
from visft.modeling.heads import HeadInputs, LabelSpace

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def test_an_image_alone_and_padded_in_a_batch_are_the_same():
    head = detr().eval()
    cells = [(4, 4), (2, 4), (3, 1)]
    features = torch.randn(3, 12, 4, 4)  # what is in the padding must not matter
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    for row, (h, w) in zip(mask, cells, strict=True):
        row[:h, :w] = False
    sizes = [(16 * h - 3, 16 * w) for h, w in cells]
    images = [
        annotated(i, size, [[1, 2, 9, 12], [3, 3, 14, 13]][: i + 1], [i, 4][: i + 1])
        for i, size in enumerate(sizes)
    ]
    together = head(features, mask)
    normalizers = head.normalizers(images)
    whole = head.losses(HeadInputs(features, mask, images, sizes, (64, 64)), normalizers)
    predictions = head.inference(HeadInputs(features, mask, images, sizes, (64, 64)))
    summed = {}
    for i, (h, w) in enumerate(cells):
        own = (features[i : i + 1, :, :h, :w], mask[i : i + 1, :h, :w], [images[i]], [sizes[i]], sizes[i])
        alone = head(own[0], own[1])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.boxes[:, 0], together.boxes[:, i], atol=1e-5, rtol=1e-4)
        for name, loss in head.losses(HeadInputs(*own), normalizers).items():
            summed[name] = summed.get(name, 0) + loss
        prediction = head.inference(HeadInputs(*own))[0]
        torch.testing.assert_close(prediction.pred_boxes.tensor, predictions[i].pred_boxes.tensor)
    assert summed.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], summed[name])


def test_losses_are_their_formulas(images):
    """One object: its matched query is the one of least cost, everything else is no object."""
    head, features = detr(class_weight=1.5, l1_weight=4.0, giou_weight=3.0), maps(1)
    found = losses(head, features, images[2:3])
    output = head(features)
    box = torch.tensor([30.0, 40, 40, 40]) / 64
    for layer, suffix in ((0, "_0"), (1, "")):
        boxes, probability = output.boxes[layer, 0], output.logits[layer, 0].softmax(-1)
        corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
        low, high = box[:2] - box[2:] / 2, box[:2] + box[2:] / 2
        inner = (torch.minimum(corners[:, 2:], high) - torch.maximum(corners[:, :2], low)).clamp(0).prod(1)
        outer = (torch.maximum(corners[:, 2:], high) - torch.minimum(corners[:, :2], low)).prod(1)
        union = boxes[:, 2:].prod(1) + box[2:].prod() - inner
        giou = inner / union - (outer - union) / outer
        l1 = (boxes - box).abs().sum(1)
        best = (4 * l1 - 3 * giou - 1.5 * probability[:, 2]).argmin()
        target, weight = torch.full((6,), 5), torch.full((6,), 0.1)
        target[best], weight[best] = 2, 1.0
        ce = -(weight * probability[torch.arange(6), target].log()).sum() / weight.sum()
        torch.testing.assert_close(found["loss_ce" + suffix], 1.5 * ce)
        torch.testing.assert_close(found["loss_bbox" + suffix], 4 * l1[best])
        torch.testing.assert_close(found["loss_giou" + suffix], 3 * (1 - giou[best]))


def test_one_transfer_to_the_host_for_all_layers_and_images(images, monkeypatch):
    calls, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self.shape) or cpu(self))
    losses(detr(), maps(), images)
    assert calls == [(2 * 6 * 9,)]  # layers x queries x objects


def test_labels_of_the_data_sets_own_ids(images):
    """Contiguous classes 0..4 are the outputs 1, 2, 4, 7, 9 of ten."""
    labels = LabelSpace(10, (1, 2, 4, 7, 9))
    plain, mapped = detr(LabelSpace(10)), detr(labels)
    mapped.load_state_dict(plain.state_dict())
    renamed = copy.deepcopy(images)
    for image in renamed:
        image["instances"].gt_classes = torch.tensor([1, 2, 4, 7, 9])[image["instances"].gt_classes]
    features = maps()
    expected, found = losses(plain, features, renamed), losses(mapped, features, images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    result = mapped.inference(inputs(features, images))[0]
    probability = mapped(features).logits[-1, 0].softmax(-1)[:, [1, 2, 4, 7, 9]]
    torch.testing.assert_close(result.scores, probability.max(1).values.sort(descending=True).values)
    assert result.pred_classes.max() < 5


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="ENCODER_DIM is 18"):
        detr(encoder_dim=18)


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_an_image_by_heart_and_finds_it_in_original_coordinates(device):
    size, boxes, classes = (48, 64), [[4, 4, 30, 40], [36, 8, 60, 24]], [3, 1]
    image = [annotated(0, size, boxes, classes)]
    head = detr().to(device)
    given = inputs(torch.randn(1, 12, 3, 4, device=device), image, size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(head.losses(given, head.normalizers(image)).values()).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        result = head.inference(given)[0].to("cpu")
    assert result.image_size == (96, 128) and len(result) == 6
    best = result[result.scores > 0.5]
    iou = pairwise_iou(Boxes(2 * torch.tensor(boxes, dtype=torch.float32)), best.pred_boxes)
    assert len(best) == 2 and iou.max(1).values.min() > 0.8
    assert best.pred_classes[iou.argmax(1)].tolist() == classes
    assert (result.scores.diff() <= 0).all()


def test_detections_are_limited_and_inside_the_image(images):
    head = detr(max_detections=3).eval()
    torch.nn.init.constant_(head.bbox_embeds.layers[-1].bias, 2.0)  # large boxes, beyond the image
    result = head.inference(inputs(maps(), images))[0]
    assert len(result) == 3
    boxes = result.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes.max() <= 128


def test_classification_is_pytorchs_weighted_mean(images):
    head = detr()
    features = maps()
    found = losses(head, features, images)
    output = head(features)
    matching = head.match(output, head.targets(inputs(features, images)))
    weight = torch.tensor([1.0] * 5 + [0.1])
    for layer, name in enumerate(("loss_ce_0", "loss_ce")):
        target = torch.full((4, 6), 5)
        for image, query, index in zip(
            matching.image, matching.query[layer], matching.target[layer], strict=True
        ):
            target[image, query] = images[image]["instances"].gt_classes[index]
        expected = F.cross_entropy(output.logits[layer].flatten(0, 1), target.flatten(), weight=weight)
        torch.testing.assert_close(found[name], expected)


def test_inference_leaves_out_what_repeats_a_better_box():
    torch.manual_seed(3)
    head, thresh = detr(LabelSpace(2), num_queries=40).eval(), 0.5
    with torch.no_grad():
        head.query_embeds.weight *= 4
        head.bbox_embeds.layers[-1].weight *= 8  # boxes of all kinds, some near each other
    given = inputs(maps(1), [{"height": 64, "width": 64}])
    every = head.inference(given)[0]
    head.nms_thresh = thresh
    kept = head.inference(given)[0]
    assert 1 < len(kept) < len(every) == 40
    assert (kept.scores.diff() <= 0).all()
    chosen = []
    for i in every.scores.argsort(descending=True).tolist():  # greedily, by the definition
        overlap = pairwise_iou(every.pred_boxes[i], every.pred_boxes)[0]
        better = [j for j in chosen if every.pred_classes[j] == every.pred_classes[i] and overlap[j] > thresh]
        chosen += [] if better else [i]
    torch.testing.assert_close(kept.pred_boxes.tensor, every.pred_boxes.tensor[chosen])
    torch.testing.assert_close(kept.pred_classes, every.pred_classes[chosen])


def test_impossible_overlap_is_refused():
    with pytest.raises(ConfigError, match=r"NMS_THRESH_TEST is 1.5; expected an IoU"):
        detr(nms_thresh=1.5)
