"""Self-distillation: what a region's feature is, what it is compared with, which regions there are."""

import pytest
import torch
from demo_models import losses_of, picture
from objective_models import assert_close, base_of, gradients, normalised, with_objectives

from visft.modeling.tower_losses import Batch
from visft.modeling.tower_losses.batch import crop, resized

BOXES = ("MODEL.VISFT.SELF_DISTILLATION.REGIONS", "boxes")


def test_loss_and_gradient_are_those_of_regions_and_crops():
    model, base = with_objectives("self_distillation", options=BOXES), base_of()
    images = [picture(number=1), picture(number=2, count=1)]
    loss = losses_of(model, images)["self_distillation/loss"]
    terms = []
    for image in images:
        map_ = model.backbone(normalised(image["image"])[None])["last_feat"][0]
        large = map_.repeat_interleave(8, 1).repeat_interleave(8, 2)
        for x0, y0, x1, y1 in image["instances"].gt_boxes.tensor.int().tolist():
            mean = large[:, y0 : min(y1, large.shape[1]), x0 : min(x1, large.shape[2])].mean((1, 2))
            cut = normalised(resized(image["image"][:, y0:y1, x0:x1], (64, 64)))
            expected = base.encode_image(cut[None]).detach()[0]
            terms.append(
                1 - torch.nn.functional.cosine_similarity(mean @ base.visual.proj.detach(), expected, dim=0)
            )
    wanted = sum(terms) / len(terms)
    assert len(terms) == 3
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    assert_close(gradients(model, loss), gradients(model, wanted), 1e-3)


def test_one_pass_of_the_tower_serves_heads_and_regions():
    """The heads' images are those of the objective: their map is not computed twice."""
    seen = []
    model = with_objectives("self_distillation", options=BOXES)
    model.backbone.register_forward_hook(lambda *_: seen.append(1))
    losses = losses_of(model, [picture(number=1), picture(number=2)])
    assert len(seen) == 1 and {name.split("/")[0] for name in losses} == {"detection", "self_distillation"}
    plain = losses_of(with_objectives(), [picture(number=1), picture(number=2)])
    assert all(torch.equal(value, losses[name]) for name, value in plain.items())


def regions(model, image, draw) -> torch.Tensor:
    batch = Batch(model.backbone, [image], lambda rows: None, draw, model.device)
    return dict(model.objectives.items())["self_distillation"].regions(batch, 0)


def test_a_grid_covers_the_image():
    options = ("MODEL.VISFT.SELF_DISTILLATION.MAX_REGIONS", 0, "MODEL.VISFT.SELF_DISTILLATION.GRID", 3)
    model, image = with_objectives("self_distillation", options=options), picture(boxes=False, masks=False)
    counts = set()
    for draw in range(60):
        boxes = regions(model, image, draw)
        covered = torch.zeros(48, 64)
        for x0, y0, x1, y1 in boxes.tolist():
            covered[round(y0) : round(y1), round(x0) : round(x1)] += 1
        assert (covered == 1).all()
        counts.add(len(boxes))
    assert counts == {1, 2, 3, 4, 6, 9}
    assert torch.equal(regions(model, image, 5), regions(model, image, 5))
    few = with_objectives("self_distillation", options=(*options[2:], *options[:1], 2))
    assert {len(regions(few, image, draw)) for draw in range(20)} == {1, 2}


def test_annotated_boxes_and_images_without():
    model = with_objectives("self_distillation", options=BOXES)
    objective = dict(model.objectives.items())["self_distillation"]
    boxed, empty, bare = picture(), picture(count=0), picture(boxes=False, masks=False)
    assert [objective.has_labels(image) for image in (boxed, empty, bare)] == [True, False, False]
    assert torch.equal(regions(model, boxed, 1), boxed["instances"].gt_boxes.tensor)
    assert "self_distillation/loss" not in losses_of(model, [empty])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 9, 7), (7, 9)),
        ((1.2, 2.0, 3.5, 3.0), (1, 3)),
        ((8.9, 6.99, 9, 7), (1, 1)),
        ((4, 4, 4, 4), (1, 1)),
    ],
)
def test_crops_have_what_a_box_touches(box, expected):
    assert crop(torch.zeros(3, 7, 9), list(box)).shape[1:] == expected
