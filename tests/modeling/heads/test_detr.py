"""DETR as a head: batches, labels, losses and predictions. Its numbers are in test_golden.py."""

import copy
from dataclasses import replace

import pytest
import torch
from annotated_images import annotated
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch.nn import functional as F

from visft.errors import ConfigError, DataError
from visft.modeling.heads import DETRHead, HeadInputs, LabelSpace

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
NOT_PADDED = torch.zeros(4, 4, 4, dtype=torch.bool)
SIZES = [(64, 64)] * 4


def make_head(labels: LabelSpace | None = None, **options) -> DETRHead:
    options = {"num_queries": 6, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0} | options
    sizes = {"encoder_dim": 16, "decoder_dim": 24, "feedforward_dim": 32, "num_attention_heads": 4}
    return DETRHead(in_channels=12, labels=labels or LabelSpace(5), **(sizes | options))


def gradients(head, losses) -> dict[str, torch.Tensor]:
    names, parameters = zip(*head.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(sum(losses.values()), parameters), strict=True))


def test_an_image_alone_and_padded_in_a_batch_are_the_same():
    head = make_head().eval()
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
    losses = head.losses(HeadInputs(features, mask, images, sizes, (64, 64)), normalizers)
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
    assert summed.keys() == losses.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], summed[name])


def test_gradients_of_two_processes_add_up_to_those_of_the_joined_batch(images):
    head, features = make_head(), torch.randn(4, 12, 4, 4)
    total = head.normalizers(images)
    torch.testing.assert_close(total, head.normalizers(images[:1]) + head.normalizers(images[1:]))
    joined = gradients(head, head.losses(HeadInputs(features, NOT_PADDED, images, SIZES, (64, 64)), total))
    parts = [
        gradients(
            head, head.losses(HeadInputs(features[s], NOT_PADDED[s], images[s], SIZES[s], (64, 64)), total)
        )
        for s in (slice(0, 1), slice(1, 4))
    ]
    # Relative to the largest: what adds to all keys alike (their bias) has a gradient of rounding errors alone.
    largest = max(gradient.abs().max().item() for gradient in joined.values())
    for name, gradient in joined.items():
        assert (parts[0][name] + parts[1][name] - gradient).abs().max() < 1e-6 * largest, name


def test_no_images_count_nothing_and_no_objects_still_give_a_loss(images):
    head, features = make_head(), torch.randn(1, 12, 4, 4)
    assert head.normalizers([]).tolist() == [0, 0]
    empty = images[1:2]
    assert head.normalizers(empty).tolist() == pytest.approx([0, 0.6])
    losses = head.losses(
        HeadInputs(features, NOT_PADDED[:1], empty, SIZES[:1], (64, 64)), head.normalizers(empty)
    )
    assert losses["loss_ce"] > 0 and losses["loss_bbox"] == losses["loss_giou"] == 0
    assert all(g.isfinite().all() for g in gradients(head, losses).values())  # and every parameter has one


def test_more_objects_than_queries(images):
    head = make_head(num_queries=2)
    normalizers = head.normalizers(images)
    assert normalizers.tolist() == pytest.approx([9, 2 + 2 * 0.1 + 1 + 0.1 + 2])
    losses = head.losses(
        HeadInputs(torch.randn(4, 12, 4, 4), NOT_PADDED, images, SIZES, (64, 64)), normalizers
    )
    assert all(loss.isfinite() for loss in losses.values())


def test_losses_are_their_formulas(images):
    """One object: its matched query is the one of least cost, everything else is no object."""
    head, features = make_head(class_weight=1.5, l1_weight=4.0, giou_weight=3.0), torch.randn(1, 12, 4, 4)
    image = images[2:3]
    losses = head.losses(
        HeadInputs(features, NOT_PADDED[:1], image, SIZES[:1], (64, 64)), head.normalizers(image)
    )
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
        torch.testing.assert_close(losses["loss_ce" + suffix], 1.5 * ce)
        torch.testing.assert_close(losses["loss_bbox" + suffix], 4 * l1[best])
        torch.testing.assert_close(losses["loss_giou" + suffix], 3 * (1 - giou[best]))


def test_one_transfer_to_the_host_for_all_layers_and_images(images, monkeypatch):
    calls, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self.shape) or cpu(self))
    head = make_head()
    inputs = HeadInputs(torch.randn(4, 12, 4, 4), NOT_PADDED, images, SIZES, (64, 64))
    head.losses(inputs, head.normalizers(images))
    assert calls == [(2 * 6 * 9,)]  # layers x queries x objects


def test_labels_of_the_data_sets_own_ids(images):
    """Contiguous classes 0..4 are the outputs 1, 2, 4, 7, 9 of ten."""
    labels = LabelSpace(10, (1, 2, 4, 7, 9))
    plain, mapped = make_head(LabelSpace(10)), make_head(labels)
    mapped.load_state_dict(plain.state_dict())
    renamed = copy.deepcopy(images)
    for image in renamed:
        image["instances"].gt_classes = torch.tensor([1, 2, 4, 7, 9])[image["instances"].gt_classes]
    features = torch.randn(4, 12, 4, 4)
    args, normalizers = (SIZES, (64, 64)), plain.normalizers(images)
    expected = plain.losses(HeadInputs(features, NOT_PADDED, renamed, *args), normalizers)
    losses = mapped.losses(HeadInputs(features, NOT_PADDED, images, *args), normalizers)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    result = mapped.inference(HeadInputs(features, NOT_PADDED, images, *args))[0]
    probability = mapped(features).logits[-1, 0].softmax(-1)[:, [1, 2, 4, 7, 9]]
    torch.testing.assert_close(result.scores, probability.max(1).values.sort(descending=True).values)
    assert result.pred_classes.max() < 5


def test_which_images_have_labels(images):
    head = make_head()
    assert head.has_labels(images[0]) and head.has_labels(images[1])
    assert not head.has_labels({"image_id": 3})
    assert head.has_labels({"instances": Instances((64, 64))})  # a mapper's, of an image with nothing on it
    assert not head.has_labels({"instances": Instances((64, 64), gt_classes=torch.tensor([1]))})


def test_a_class_that_the_head_does_not_have_is_named(images):
    images[0]["file_name"] = "some/picture.jpg"
    with pytest.raises(DataError, match="some/picture.jpg.*class 2.*0 to 1"):
        make_head(LabelSpace(2)).normalizers(images)


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="ENCODER_DIM is 18"):
        make_head(encoder_dim=18)


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_an_image_by_heart_and_finds_it_in_original_coordinates(device):
    size, boxes, classes = (48, 64), [[4, 4, 30, 40], [36, 8, 60, 24]], [3, 1]
    image = [annotated(0, size, boxes, classes)]
    head = make_head().to(device)
    features = torch.randn(1, 12, 3, 4, device=device)
    args = (features, NOT_PADDED[:1, :3].to(device), image, [size], size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(head.losses(HeadInputs(*args), head.normalizers(image)).values()).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        result = head.inference(HeadInputs(*args))[0].to("cpu")
    assert result.image_size == (96, 128) and len(result) == 6
    best = result[result.scores > 0.5]
    iou = pairwise_iou(Boxes(2 * torch.tensor(boxes, dtype=torch.float32)), best.pred_boxes)
    assert len(best) == 2 and iou.max(1).values.min() > 0.8
    assert best.pred_classes[iou.argmax(1)].tolist() == classes
    assert (result.scores.diff() <= 0).all()


def test_detections_are_limited_and_inside_the_image(images):
    head = make_head(max_detections=3).eval()
    torch.nn.init.constant_(head.bbox_embeds.layers[-1].bias, 2.0)  # large boxes, beyond the image
    result = head.inference(HeadInputs(torch.randn(4, 12, 4, 4), NOT_PADDED, images, SIZES, (64, 64)))[0]
    assert len(result) == 3
    boxes = result.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes.max() <= 128


def test_autocast_and_features_in_half_precision(images):
    head, features = make_head(), torch.randn(4, 12, 4, 4)
    inputs = HeadInputs(features, NOT_PADDED, images, SIZES, (64, 64))
    normalizers = head.normalizers(images)
    exact = head.losses(inputs, normalizers)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head.losses(inputs, normalizers)
    stored = head.losses(replace(inputs, features=features.bfloat16()), normalizers)
    for name in exact:
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.1)
        assert stored[name].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_classification_is_pytorchs_weighted_mean(images):
    head = make_head()
    features, normalizers = torch.randn(4, 12, 4, 4), head.normalizers(images)
    inputs = HeadInputs(features, NOT_PADDED, images, SIZES, (64, 64))
    losses = head.losses(inputs, normalizers)
    output, targets = head(features), head._targets(images, SIZES, features.device)
    matching = head.match(output, targets)
    weight = torch.tensor([1.0] * 5 + [0.1])
    for layer, name in enumerate(("loss_ce_0", "loss_ce")):
        target = torch.full((4, 6), 5)
        for image, query, index in zip(
            matching.image, matching.query[layer], matching.target[layer], strict=True
        ):
            target[image, query] = images[image]["instances"].gt_classes[index]
        expected = F.cross_entropy(output.logits[layer].flatten(0, 1), target.flatten(), weight=weight)
        torch.testing.assert_close(losses[name], expected)


def test_inference_leaves_out_what_repeats_a_better_box():
    torch.manual_seed(3)
    head, thresh = make_head(LabelSpace(2), num_queries=40).eval(), 0.5
    with torch.no_grad():
        head.query_embeds.weight *= 4
        head.bbox_embeds.layers[-1].weight *= 8  # boxes of all kinds, some near each other
    inputs = (torch.randn(1, 12, 4, 4), NOT_PADDED[:1], [{"height": 64, "width": 64}], SIZES[:1], (64, 64))
    every = head.inference(HeadInputs(*inputs))[0]
    head.nms_thresh = thresh
    kept = head.inference(HeadInputs(*inputs))[0]
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
        make_head(nms_thresh=1.5)
