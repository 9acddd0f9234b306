"""Class losses: softmax and sigmoid, and the federated loss over either, on both heads that match queries."""

from dataclasses import replace

import numpy as np
import pytest
import small_rcnn
import torch
from annotated_images import annotated
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from query_heads import KINDS, inputs, losses, maps

from visft import add_visft_config
from visft.errors import ConfigError
from visft.modeling.heads import LabelSpace, build_head
from visft.modeling.heads.common.classification import (
    SigmoidClassification,
    SoftmaxClassification,
    build_classification,
)
from visft.modeling.heads.common.federated import Federated
from visft.modeling.heads.common.matcher import Matching

CLASSES, QUERIES = 5, 6


def make(kind: str, **options):
    return KINDS[kind](LabelSpace(CLASSES), num_queries=QUERIES, **options)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def matching() -> Matching:
    """Two images, of two layers: query 1 and 3 of the first are matched, and query 0 of the second."""
    return Matching(
        image=torch.tensor([0, 0, 1]),
        query=torch.tensor([[1, 3, 0], [3, 2, 4]]),
        target=torch.tensor([[0, 1, 0], [0, 1, 0]]),
        counts=(2, 1),
    )


LABELS = torch.tensor([[4, 2], [1, 0]])


def test_sigmoid_is_the_focal_loss_of_each_class():
    """Computed pair by pair from the formula of arXiv 1708.02002, equations 4 and 5."""
    logits = torch.randn(2, 2, QUERIES, CLASSES + 1, dtype=torch.float64)
    found = SigmoidClassification().losses(logits, LABELS, matching())
    target = np.zeros(logits.shape)
    for place in ((0, 0, 1, 4), (0, 0, 3, 2), (0, 1, 0, 1), (1, 0, 3, 4), (1, 0, 2, 2), (1, 1, 4, 1)):
        target[place] = 1  # layer, image, query, label
    p = 1 / (1 + np.exp(-logits.numpy()))
    loss = np.where(target == 1, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    np.testing.assert_allclose(found.numpy(), loss[..., :-1].sum((1, 2, 3)), rtol=1e-5)
    other = logits.clone()
    other[..., -1] += 3  # no-object does not take part
    torch.testing.assert_close(SigmoidClassification().losses(other, LABELS, matching()), found)


def test_sigmoids_cost_is_what_the_loss_grows_by():
    """Matching a query with a target of class c changes its focal loss at c from that of a negative to a positive."""
    logits = torch.randn(1, 1, 1, CLASSES + 1)
    nobody = Matching(*(torch.zeros(s, dtype=torch.int64) for s in ((0,), (1, 0), (1, 0))), counts=(0,))
    method = SigmoidClassification()
    for label in range(CLASSES):
        one = Matching(*(torch.zeros(s, dtype=torch.int64) for s in ((1,), (1, 1), (1, 1))), counts=(1,))
        grown = method.losses(logits, torch.tensor([[label]]), one) - method.losses(
            logits, torch.zeros(1, 1, dtype=torch.int64), nobody
        )
        torch.testing.assert_close(method.costs(logits)[0, 0, 0, label], grown[0], atol=1e-5, rtol=1e-4)


def test_fresh_sigmoid_classes_start_improbable(kind):
    head = make(kind, class_loss="sigmoid")
    layer = head.class_embeds if kind == "detr" else head.predictor.class_embed
    torch.testing.assert_close(layer.bias.detach().sigmoid(), torch.full((CLASSES + 1,), 0.01))


def test_the_default_is_softmax(kind, images):
    """Golden vectors fix its numbers; here: naming it changes nothing, and sigmoid does."""
    features = maps()
    torch.manual_seed(1)
    default = losses(make(kind), features, images)
    for name, same in (("softmax", True), ("sigmoid", False)):
        torch.manual_seed(1)
        found = losses(make(kind, class_loss=name), features, images)
        assert found.keys() == default.keys()
        assert torch.equal(found["loss_ce"], default["loss_ce"]) is same


def test_sigmoids_losses_are_divided_by_the_number_of_objects(kind, images):
    head, features = make(kind, class_loss="sigmoid").eval(), maps()
    single = losses(head, features, images)
    doubled = head.normalizers(images)
    doubled[0] *= 2
    twice = losses(head, features, images, doubled)
    torch.testing.assert_close(twice["loss_ce"], single["loss_ce"] / 2)


def test_sigmoid_learns(kind, images):
    """Every head of a batch that is shown again and again comes to score its objects."""
    head, features = make(kind, class_loss="sigmoid"), maps()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    first = sum(losses(head, features, images).values()).item()
    for _ in range(40):
        optimizer.zero_grad()
        total = sum(losses(head, features, images).values())
        total.backward()
        optimizer.step()
    assert total.item() < 0.8 * first


def test_inference_takes_the_best_pairs(kind, images):
    """With sigmoid a query may be found as two classes; scores are probabilities of single classes."""
    head = make(kind, class_loss="sigmoid", max_detections=QUERIES * CLASSES).eval()
    features = maps()
    found = head.inference(inputs(features, images))
    output = head(features)
    probability = output.logits[-1].sigmoid()[..., :-1]
    for row, result in enumerate(found):
        assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True) or kind == "mask2former"
        if kind == "detr":
            assert len(result) == QUERIES * CLASSES
            expected = probability[row].flatten().sort(descending=True).values
            torch.testing.assert_close(result.scores, expected)
            counts = torch.bincount(result.pred_classes, minlength=CLASSES)
            assert counts.tolist() == [QUERIES] * CLASSES


def test_an_unknown_loss_is_named():
    with pytest.raises(ConfigError, match="CLASS_LOSS is `focal`; expected softmax or sigmoid"):
        build_classification("focal", 0.1)


# The federated loss


def federated(number: int, weights=(1.0, 1, 1, 1, 1)) -> Federated:
    return Federated(number, torch.tensor([*weights, 0.0]))


@pytest.mark.parametrize(
    "method", [SoftmaxClassification(0.1), SigmoidClassification()], ids=["softmax", "sigmoid"]
)
def test_left_out_classes_are_as_if_the_head_had_not_them(method):
    """The loss and its gradient are those of the columns that stay."""
    logits = torch.randn(2, 2, QUERIES, CLASSES + 1, requires_grad=True)
    chosen = torch.tensor([False, True, True, False, True, True])
    found = method.losses(Federated.leave_out(logits, chosen), LABELS, matching())
    columns = chosen.nonzero().flatten()
    renumbered = (torch.cumsum(chosen, 0) - 1)[LABELS]
    expected = method.losses(logits[..., columns], renumbered, matching())
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (reference,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, reference)
    assert (gradient[..., ~chosen] == 0).all() and (gradient[..., chosen][..., :-1] != 0).any()
    costs = method.costs(Federated.leave_out(logits, chosen))[..., chosen]
    torch.testing.assert_close(costs, method.costs(logits[..., columns]))


def test_classes_are_drawn_as_detectron2_draws_them():
    """Those annotated, and others by frequency: the same ones from the same state of the generator."""
    weights = torch.tensor([3.0, 20, 1, 7, 40, 5, 11, 2]) ** 0.5
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=2),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        num_classes=8,
        use_fed_loss=True,
        use_sigmoid_ce=True,
        get_fed_loss_cls_weights=lambda: weights,
        fed_loss_num_classes=5,
    )
    ours = Federated(5, torch.cat((weights, torch.zeros(1))))
    seen = set()
    for seed in range(30):
        annotated_ones = torch.tensor([1, 6]) if seed % 2 else torch.tensor([0, 1, 2, 3, 4, 7])
        torch.manual_seed(seed)
        expected = stock.get_fed_loss_classes(annotated_ones, 5, 8, stock.fed_loss_cls_weights)
        torch.manual_seed(seed)
        present = torch.zeros(9)
        present[annotated_ones] = 0.5  # a mean over processes
        chosen = ours.draw(present)
        assert chosen[-1] and set(chosen[:-1].nonzero().flatten().tolist()) == set(expected.tolist())
        seen.add(tuple(chosen.tolist()))
    assert len(seen) > 5


def test_outputs_that_are_no_class_are_never_drawn():
    """As with the data set's own ids as labels, which have gaps; and there may be fewer classes than wanted."""
    chosen = federated(50, (0.0, 2, 0, 3, 1)).draw(torch.zeros(6))
    assert chosen.tolist() == [False, True, False, True, True, True]


def test_a_head_with_all_classes_taking_part_is_a_head_without(kind, images):
    features = maps()
    for name in ("softmax", "sigmoid"):
        torch.manual_seed(1)
        plain = losses(make(kind, class_loss=name), features, images)
        torch.manual_seed(1)
        found = losses(make(kind, class_loss=name, federated=federated(CLASSES)), features, images)
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_absent_classes_that_are_not_drawn_get_no_gradient(kind, name, images):
    images = [annotated(1, (64, 64), [[4, 4, 30, 40], [20, 8, 60, 24]], [1, 3])]
    head = make(kind, class_loss=name, federated=federated(3, (0.0, 1, 1, 1, 0)))
    layer = head.class_embeds if kind == "detr" else head.predictor.class_embed
    total = sum(losses(head, maps(), images).values())
    (gradient,) = torch.autograd.grad(total, layer.weight)
    moved = (gradient != 0).any(1).tolist()
    # 1 and 3 are annotated, 2 can be drawn; no-object counts in the softmax alone.
    assert moved == [False, True, True, True, False, name == "softmax"]


def test_processes_leave_out_the_same_classes(kind, images):
    """The gradient of a batch shared by two processes is that of the batch: each knows what the other has annotated."""
    images = [images[0], images[3]]
    head = make(kind, federated=federated(3)).eval()
    features = maps()
    whole = head.normalizers(images)
    assert len(whole) == 2 + CLASSES + 1 and whole[2:].tolist() == [1] * CLASSES + [0]
    # As the meta-architecture: the mean over processes.
    mean = torch.stack([head.normalizers([image]) for image in images]).mean(0)
    together = losses(head, features, images, whole)
    alone = [losses(head, features[i : i + 1], images[i : i + 1], mean) for i in range(2)]
    for key, value in together.items():
        parts = torch.stack([part[key] for part in alone]).mean()
        if key.startswith("loss_ce"):
            torch.testing.assert_close(parts, value, msg=key)


# From a config


def config(head: str, train: str, **keys):
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.DATASETS.TRAIN = (train,)
    node = cfg.MODEL.VISFT[head]
    for key, value in {"ENCODER_LAYERS": 1, "DECODER_LAYERS": 1, **keys}.items():
        node[key] = value
    return cfg


@pytest.mark.parametrize("head", ["DETECTION", "SEGMENTATION"])
def test_lvis_frequencies_come_from_its_metadata(head):
    cfg = config(head, "lvis_v1_train", CLASS_LOSS="sigmoid", FED_LOSS_CLASSES=50, FED_LOSS_POWER=0.5)
    built = build_head(cfg, head.lower(), ShapeSpec(channels=16, stride=16))
    assert built.labels.num_classes == 1203 and built.classification.pairs
    counts = {c["id"]: c["image_count"] for c in MetadataCatalog.get("lvis_v1_train").class_image_count}
    weights = built.federated.weights
    assert len(weights) == 1204 and weights[-1] == 0
    for index in (0, 3, 500, 1202):
        assert weights[index].item() == pytest.approx(counts[index + 1] ** 0.5)
    assert built.federated.draw(torch.zeros(1204)).sum() == 51


def test_the_head_of_rcnn_has_detectron2s_federated_loss():
    cfg = small_rcnn.config(MODEL__VISFT__DETECTION__NUM_CLASSES=0, MODEL__MASK_ON=False)
    cfg.DATASETS.TRAIN, box = ("lvis_v1_train",), cfg.MODEL.ROI_BOX_HEAD
    box.USE_FED_LOSS = box.USE_SIGMOID_CE = True
    head = build_head(cfg, "detection", ShapeSpec(channels=4, stride=16))
    predictor = head.roi_heads.box_predictor
    assert predictor.use_fed_loss and len(predictor.fed_loss_cls_weights) == 1203
    images = [annotated(1, (64, 64), [[4, 4, 30, 40], [20, 8, 60, 24]], [3, 700])]
    counts = head.normalizers(images)
    found = head.losses(inputs(torch.randn(1, 4, 4, 4), images), counts)
    (gradient,) = torch.autograd.grad(found["loss_cls"], predictor.cls_score.bias)
    learnt = gradient.nonzero().flatten().tolist()
    assert {3, 700} <= set(learnt) and len(learnt) in (49, 50)  # background is one of the 50
    box.USE_SIGMOID_CE = False
    with pytest.raises(ConfigError, match="sigmoid cross entropy"):
        build_head(cfg, "detection", ShapeSpec(channels=4, stride=16))
    box.USE_SIGMOID_CE = True
    cfg.DATASETS.TRAIN, cfg.MODEL.VISFT.DETECTION.NUM_CLASSES = ("coco_2017_train",), 80
    with pytest.raises(ConfigError, match="class_image_count"):
        build_head(cfg, "detection", ShapeSpec(channels=4, stride=16))


@pytest.mark.parametrize(
    ("train", "keys", "message"),
    [
        ("coco_2017_train", {}, "DETECTION.FED_LOSS_CLASSES is set, but the metadata of coco_2017_train"),
        ("lvis_v1_train", {"NUM_CLASSES": 80}, "has 80 classes, lvis_v1_train says of 1203"),
    ],
)
def test_metadata_that_does_not_fit_is_named(train, keys, message):
    cfg = config("DETECTION", train, FED_LOSS_CLASSES=50, **keys)
    with pytest.raises(ConfigError, match=message):
        build_head(cfg, "detection", ShapeSpec(channels=16, stride=16))


def test_frequencies_follow_the_labels_own_ids():
    """With the data set's ids as labels, outputs between them are no classes."""
    name = "classification_test_ids"
    MetadataCatalog.get(name).set(
        thing_classes=["a", "b", "c"],
        thing_dataset_id_to_contiguous_id={2: 0, 5: 1, 9: 2},
        class_image_count=[{"id": i, "image_count": n} for i, n in ((9, 100), (2, 4), (5, 9))],
    )
    DatasetCatalog.register(name, list)
    try:
        cfg = config("DETECTION", name, LABEL_SPACE="dataset_id", FED_LOSS_CLASSES=2)
        built = build_head(cfg, "detection", ShapeSpec(channels=16, stride=16))
        assert built.federated.weights.tolist() == [0, 0, 2, 0, 0, 3, 0, 0, 0, 10, 0]
        images = [annotated(1, (64, 64), [[4, 4, 30, 40]], [2])]
        present = built.normalizers(images)[2:]
        assert present.nonzero().flatten().tolist() == [9]
        chosen = replace(built.federated, num_classes=1).draw(present)
        assert chosen.nonzero().flatten().tolist() == [9, 10]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
