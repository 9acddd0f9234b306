"""R-CNN as a head: the same numbers as detectron2's GeneralizedRCNN made of the same parts."""

import pytest
import small_rcnn
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone import Backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from visft.errors import ConfigError, DataError
from visft.modeling.heads import HeadInputs
from visft.modeling.heads.rcnn_head import FEATURE, RCNNHead, detector_stride

CHANNELS = 16


class Pooled(Backbone):
    """A map for any image, so that a whole GeneralizedRCNN can be run beside the head."""

    def __init__(self, stride: int):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, CHANNELS, stride, stride)
        self.stride = stride

    def forward(self, images):
        return {FEATURE: self.convolution(images)}

    def output_shape(self):
        return {FEATURE: ShapeSpec(channels=CHANNELS, stride=self.stride)}

    @property
    def size_divisibility(self):
        return self.stride


def build(stride: int = 16, **options) -> RCNNHead:
    return small_rcnn.build(CHANNELS, stride, **options)


def picture(height: int, width: int, boxes: list[list[float]], kind: str = "polygons") -> dict:
    """An image with rectangles of the classes 0, 1, ... as objects."""
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    polygons = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes]
    masks = PolygonMasks(polygons)
    if kind != "polygons":
        masks = BitMasks.from_polygon_masks(masks, height, width)
        masks = masks.tensor if kind == "tensor" else masks
    instances.gt_masks = masks
    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 2 * height, "width": 3 * width}


def batch(kind: str = "polygons") -> list[dict]:
    torch.manual_seed(5)
    return [
        picture(64, 96, [[5, 5, 40, 30], [30, 20, 90, 60]], kind),
        picture(80, 64, [[8, 10, 50, 70]], kind),
    ]


def beside(head: RCNNHead, stride: int = 16) -> GeneralizedRCNN:
    """detectron2's own model, of the head's parts."""
    return GeneralizedRCNN(
        backbone=Pooled(stride),
        proposal_generator=head.proposal_generator,
        roi_heads=head.roi_heads,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[255.0, 255.0, 255.0],
    )


def arguments(model: GeneralizedRCNN, images: list[dict]) -> tuple:
    """What the meta-architecture passes to a head, for the features of `model`'s backbone."""
    padded: ImageList = model.preprocess_image(images)
    features = model.backbone(padded.tensor)[FEATURE]
    mask = torch.zeros(len(images), *features.shape[-2:], dtype=torch.bool)
    return features, mask, images, padded.image_sizes, tuple(padded.tensor.shape[-2:])


PARTS = {
    "mask": {},
    "faster": {"MODEL__MASK_ON": False},
    "cascade": {
        "MODEL__ROI_HEADS__NAME": "CascadeROIHeads",
        "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True,
    },
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["polygons", "bitmasks", "tensor"])
def test_losses_are_detectron2s(parts, kind):
    head = build(**PARTS[parts])
    model = beside(head)
    images = batch(kind)
    torch.manual_seed(1)
    losses = head.losses(HeadInputs(*arguments(model, images)), head.normalizers(images))
    stock = batch("bitmasks" if kind == "tensor" else kind)  # detectron2 does not know plain tensors
    torch.manual_seed(1)
    with EventStorage():
        expected = model(stock)
    assert set(losses) == set(expected) and len(losses) >= 4
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)


@pytest.mark.parametrize("parts", PARTS)
def test_detections_are_detectron2s(parts):
    head = build(**PARTS[parts]).eval()
    model = beside(head).eval()
    images = batch()
    with torch.no_grad():
        found = head.inference(HeadInputs(*arguments(model, images)))
        expected = [output["instances"] for output in model(images)]
    for ours, theirs, image in zip(found, expected, images, strict=True):
        assert ours.image_size == (image["height"], image["width"])
        assert len(ours) == len(theirs) > 0
        assert ours.has("pred_masks") == (parts != "faster")
        for field, value in theirs.get_fields().items():
            value, own = (getattr(v, "tensor", v) for v in (value, ours.get(field)))
            assert torch.equal(own, value), field


def test_a_frozen_head_still_has_losses():
    """Stage `lora`: evaluation mode, the gradient flows to the features, batch statistics stay."""
    head = build(MODEL__ROI_BOX_HEAD__NUM_CONV=1, MODEL__ROI_BOX_HEAD__NORM="BN").eval().requires_grad_(False)
    model = beside(head)
    images = batch()
    statistics = {name: value.clone() for name, value in head.named_buffers() if "running" in name}
    assert statistics
    given = arguments(model, images)
    losses = head.losses(HeadInputs(*given), head.normalizers(images))
    sum(losses.values()).backward()
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    assert model.backbone.convolution.weight.grad.abs().sum() > 0
    assert not any(module.training for module in head.modules())
    assert all(torch.equal(value, dict(head.named_buffers())[name]) for name, value in statistics.items())


def test_losses_count_images_over_all_processes():
    """A process with one of two images takes half of the joined batch's region proposal loss, and so on."""
    head = build()
    model, images = beside(head), batch()
    torch.manual_seed(1)
    own = head.losses(HeadInputs(*arguments(model, images[:1])), torch.tensor([1.0]))
    torch.manual_seed(1)
    shared = head.losses(HeadInputs(*arguments(model, images[:1])), torch.tensor([2.0]))
    for name, value in own.items():
        torch.testing.assert_close(2 * shared[name], value)


def test_an_image_without_objects_is_labelled_though_it_has_no_masks():
    head = build()
    empty, bare, foreign = (picture(64, 64, []) for _ in range(3))
    empty["instances"].remove("gt_masks")
    bare["instances"] = Instances((64, 64))
    del foreign["instances"]
    boxes_only = picture(64, 64, [[4, 4, 30, 30]])
    boxes_only["instances"].remove("gt_masks")
    assert head.has_labels(empty) and head.has_labels(bare)
    assert not head.has_labels(foreign) and not head.has_labels(boxes_only)
    assert build(MODEL__MASK_ON=False).has_labels(boxes_only)
    assert head.normalizers([]).tolist() == [0]

    model, images = beside(head), [empty, bare]
    losses = head.losses(HeadInputs(*arguments(model, images)), head.normalizers(images))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    # DistributedDataParallel waits for every parameter.
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_a_class_that_the_head_has_not_is_named():
    images = [picture(64, 64, [[4, 4, 30, 30]] * 4) | {"file_name": "four.png"}]
    with pytest.raises(DataError, match=r"four\.png.*class 3"):
        build().normalizers(images)


def test_proposals_may_come_with_the_images():
    head = build(MODEL__PROPOSAL_GENERATOR__NAME="PrecomputedProposals").eval()
    model, images = beside(build()), batch()
    for image in images:
        image["proposals"] = Instances(image["image"].shape[-2:])
        image["proposals"].proposal_boxes = Boxes(image["instances"].gt_boxes.tensor.clone())
        image["proposals"].objectness_logits = torch.zeros(len(image["instances"]))
    losses = head.losses(HeadInputs(*arguments(model, images)), head.normalizers(images))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    assert len(head.inference(HeadInputs(*arguments(model, images)))[0]) > 0


def test_stride_14_is_resampled_to_16_and_places_stay():
    """A map that holds its cells' coordinates must hold the new cells' coordinates afterwards."""
    assert [detector_stride(stride) for stride in (8, 14, 16, 32)] == [8, 16, 16, 32]
    head = build(stride=14)
    height, width = 12, 18
    y = (torch.arange(height) + 0.5).mul(14).view(1, 1, -1, 1).expand(1, CHANNELS, height, width)
    maps, images = head._maps(HeadInputs(y, None, [{}], [(160, 240)], (14 * height, 14 * width)))
    rows = maps[FEATURE][0, 0, :, 0]
    assert maps[FEATURE].shape[-2:] == (168 // 16, 252 // 16)
    torch.testing.assert_close(rows, (torch.arange(len(rows)) + 0.5) * 16)
    assert images.image_sizes == [(160, 240)]

    model = beside(head, stride=14)
    pictures = batch()
    losses = head.losses(HeadInputs(*arguments(model, pictures)), head.normalizers(pictures))
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize(
    ("parts", "layers"),
    [
        ("mask", {"roi_heads.box_predictor", "roi_heads.mask_head.predictor"}),
        ("faster", {"roi_heads.box_predictor"}),
        ("cascade", {f"roi_heads.box_predictor.{i}" for i in range(3)} | {"roi_heads.mask_head.predictor"}),
    ],
)
def test_class_layers_are_what_the_number_of_classes_shapes(parts, layers):
    few, many = (build(**PARTS[parts], MODEL__VISFT__DETECTION__NUM_CLASSES=n) for n in (3, 7))
    assert set(few.class_layers) == layers
    shapes = {name: value.shape for name, value in many.state_dict().items()}
    differ = {name for name, value in few.state_dict().items() if shapes[name] != value.shape}
    assert differ and all(name.startswith(few.class_layers) for name in differ)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"MODEL__ROI_HEADS__NAME": "Res5ROIHeads"}, "StandardROIHeads"),
        ({"MODEL__ROI_HEADS__NAME": "StandardROIHead"}, "StandardROIHead"),
        ({"MODEL__PROPOSAL_GENERATOR__NAME": "RPM"}, "RPM"),
        ({"MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32]]}, "ANCHOR_GENERATOR"),
        ({"MODEL__VISFT__DETECTION__LABEL_SPACE": "dataset_id"}, "contiguous"),
    ],
)
def test_parts_that_do_not_fit_are_a_config_error(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)
