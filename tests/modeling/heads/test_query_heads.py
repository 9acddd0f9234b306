"""What DETR and Mask2Former have in common as heads: labels, counts, several processes, mixed precision."""

import pytest
import torch
from detectron2.structures import Instances
from query_heads import KINDS, gradients, losses, maps

from visft.errors import DataError
from visft.modeling.heads import LabelSpace


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def test_gradients_of_two_processes_add_up_to_those_of_the_joined_batch(make, images):
    """Also: images alone give what they give in a batch, random points included."""
    head, features = make(), maps()
    total = head.normalizers(images)
    torch.testing.assert_close(total, head.normalizers(images[:1]) + head.normalizers(images[1:]))
    whole = losses(head, features, images, total)
    halves = [losses(head, features[s], images[s], total) for s in (slice(0, 1), slice(1, 4))]
    for name in whole:
        torch.testing.assert_close(halves[0][name] + halves[1][name], whole[name])
    joined, parts = gradients(head, whole), [gradients(head, half) for half in halves]
    # Relative to the largest: what adds to all keys alike (their bias) has a gradient of rounding errors alone.
    largest = max(gradient.abs().max().item() for gradient in joined.values())
    for name, gradient in joined.items():
        assert (parts[0][name] + parts[1][name] - gradient).abs().max() < 1e-6 * largest, name


def test_no_images_count_nothing_and_no_objects_still_give_a_loss(make, images):
    head, features = make(), maps(1)
    assert head.normalizers([]).tolist() == [0, 0]
    assert head.normalizers(images[1:2]).tolist() == pytest.approx([0, 0.6])
    found = losses(head, features, images[1:2])
    assert all((value > 0) == name.startswith("loss_ce") for name, value in found.items())
    # Every parameter has a gradient, as training in several processes needs.
    assert all(g.isfinite().all() for g in gradients(head, found).values())
    bare = {"image_id": 8, "instances": Instances((64, 64))}
    assert losses(head, features, [bare]) == found


def test_more_objects_than_queries(make, images):
    head = make(num_queries=2)
    assert head.normalizers(images).tolist() == pytest.approx([9, 2 + 2 * 0.1 + 1 + 0.1 + 2])
    assert all(loss.isfinite() for loss in losses(head, maps(), images).values())


def test_which_images_have_labels(make, images):
    head = make()
    assert head.has_labels(images[0]) and head.has_labels(images[1])
    assert not head.has_labels({"image_id": 3})
    assert head.has_labels({"instances": Instances((64, 64))})  # a mapper's, of an image with nothing on it
    images[0]["instances"].remove("gt_boxes" if make is KINDS["detr"] else "gt_masks")
    assert not head.has_labels(images[0])


def test_a_class_that_the_head_does_not_have_is_named(make, images):
    images[0]["file_name"] = "some/picture.jpg"
    with pytest.raises(DataError, match="some/picture.jpg.*class 2.*0 to 1"):
        make(LabelSpace(2)).normalizers(images)


def test_autocast_and_features_in_half_precision(make, images):
    head, features = make(), maps()
    exact = losses(head, features, images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = losses(head, features, images)
    stored = losses(head, features.bfloat16(), images)
    limit = 0.1 if make is KINDS["detr"] else 0.15
    for name in exact:
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=limit)
        assert stored[name].item() == pytest.approx(exact[name].item(), rel=limit)
