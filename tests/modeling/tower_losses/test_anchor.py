"""The anchor: nothing at first, then the cosine distance to what open_clip's own base says."""

import numpy as np
import pytest
import torch
from demo_models import losses_of, picture
from objective_models import NATIVE, assert_close, base_of, captioned, gradients, normalised, with_objectives
from PIL import Image
from torchvision.transforms.functional import rgb_to_grayscale

from visft.errors import ConfigError
from visft.modeling.backbone import lora
from visft.modeling.tower_losses import anchor
from visft.modeling.tower_losses.anchor import recolored
from visft.modeling.tower_losses.batch import Batch, crop, resized

FULL = ("MODEL.VISFT.TUNE", "full")


@pytest.mark.parametrize("options", [(), FULL])
def test_exactly_zero_before_the_tower_has_changed(options):
    model = with_objectives("anchor", options=("MODEL.LORA.DROPOUT", 0.5, *options), tuned=False)
    losses = losses_of(model, [picture(), picture((40, 70), number=2)])
    assert float(losses["anchor/loss"].detach()) == 0
    assert all(not g.any() for g in gradients(model, losses["anchor/loss"]).values())


def test_loss_and_gradient_are_those_of_one_minus_the_cosine():
    model, base, images = with_objectives("anchor"), base_of(), captioned()
    loss = losses_of(model, images)["anchor/loss"]
    pixels = torch.stack([normalised(image["image"]) for image in images])
    tuned = model.backbone.image_embedding(pixels)
    expected = 1 - torch.nn.functional.cosine_similarity(tuned, base.encode_image(pixels).detach()).mean()
    assert float(expected.detach()) > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert_close(gradients(model, loss), gradients(model, expected))


def test_full_is_anchored_to_the_weights_that_the_model_was_built_with():
    model, base, images = with_objectives("anchor", options=FULL), base_of(), captioned()
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.mlp.c_fc.weight.mul_(1.5)
    pixels = torch.stack([normalised(image["image"]) for image in images])
    with torch.no_grad():
        tuned, before = model.backbone.image_embedding(pixels), base.encode_image(pixels)
        expected = 1 - torch.nn.functional.cosine_similarity(tuned, before).mean()
    assert float(expected) > 1e-3
    torch.testing.assert_close(
        losses_of(model, images)["anchor/loss"].detach(), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("options", [(), FULL])
def test_the_original_is_no_part_of_the_model(options):
    plain, anchored = (with_objectives(*names, options=options) for names in ((), ("anchor",)))
    assert list(plain.state_dict()) == list(anchored.state_dict())
    assert len(list(plain.modules())) == len(list(anchored.modules()))


def test_weight_and_size():
    images = captioned()
    once, more = (
        losses_of(with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.WEIGHT", factor)), images)
        for factor in (1.0, 2.5)
    )
    torch.testing.assert_close(more["anchor/loss"], 2.5 * once["anchor/loss"])
    model = with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.SIZE", 32))
    pixels = torch.stack([normalised(resized(image["image"], (32, 32))) for image in images])
    with torch.no_grad():
        tuned = model.backbone.image_embedding(pixels)
        with lora.switched_off(model.backbone):
            before = model.backbone.image_embedding(pixels)
        expected = 1 - torch.nn.functional.cosine_similarity(tuned, before).mean()
    found = losses_of(model, images)["anchor/loss"].detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.isclose(found, once["anchor/loss"].detach())


def test_parts_of_an_image_are_anchored_beside_the_whole(monkeypatch):
    """Parts are cut here anew, from where the objective says that it cuts."""
    taken = []

    def noted(picture, box):
        taken.append((picture, box))
        return crop(picture, box)

    monkeypatch.setattr(anchor, "crop", noted)
    images = captioned(size=(NATIVE, 96))
    model = with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.CROPS", 3))
    loss = losses_of(model, images)["anchor/loss"]
    assert len(taken) == 9 and len({tuple(box) for _, box in taken}) == 9
    for x0, y0, x1, y1 in (box for _, box in taken):
        assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= NATIVE
        assert (x1 - x0) / 96 == pytest.approx((y1 - y0) / NATIVE) and (x1 - x0) / 96 >= 0.2
    views = [image["image"] for image in images]
    for shown, box in taken:
        x0, y0, x1, y1 = (int(edge) for edge in (box[0], box[1], np.ceil(box[2]), np.ceil(box[3])))
        views.append(shown[:, y0:y1, x0:x1])
    pixels = torch.stack([normalised(resized(view, (NATIVE, NATIVE))) for view in views])
    before = base_of().encode_image(pixels).detach()
    expected = (
        1 - torch.nn.functional.cosine_similarity(model.backbone.image_embedding(pixels), before).mean()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert_close(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("inverted", [0.2, 0.7])
def test_recoloured_part_is_grey_or_its_negative_of_another_contrast(inverted):
    part = picture()["image"].float() * 0.3 + 90  # so that no value is clamped
    assert torch.equal(recolored(part, 0.4, inverted, 0.9), part)
    grey = rgb_to_grayscale(part)  # torchvision rounds the weights to four digits
    if inverted >= 0.5:
        grey = 255 - grey
    for contrast, factor in ((0.5, 1.0), (0.0, 0.5), (1.0, 2.0)):
        found = recolored(part, 0.6, inverted, contrast)
        assert found.shape == part.shape and (found.amin(0) == found.amax(0)).all()
        expected = grey.mean() + factor * (grey - grey.mean())
        torch.testing.assert_close(found[:1], expected, atol=0.1, rtol=0)


def test_half_of_the_parts_are_recoloured_and_all_are_of_the_same_places():
    images = [captioned(size=(NATIVE, 96))[0] | {"image_id": number} for number in range(40)]
    plain, recoloured = parts_of(images, False), parts_of(images, True)
    same = [torch.equal(a, b.to(a)) for a, b in zip(plain, recoloured, strict=True)]
    assert [a.shape for a in plain] == [b.shape for b in recoloured] and 25 < sum(same) < 55  # of 80


def parts_of(images: list[dict], recolor: bool) -> list[torch.Tensor]:
    """Two parts of each image."""
    options = ("MODEL.VISFT.ANCHOR.CROPS", 2, "MODEL.VISFT.ANCHOR.RECOLOR", recolor)
    model = with_objectives("anchor", options=options)
    batch = Batch(model.backbone, images, None, 5, torch.device("cpu"))
    ((_, objective),) = model.objectives.items()
    return [part for row in range(len(images)) for part in objective.parts(batch, row)]


def test_recolouring_without_parts_is_refused():
    with pytest.raises(ConfigError, match="RECOLOR is set, and .*CROPS is 0"):
        with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.RECOLOR", True))


def test_a_negative_number_of_parts():
    with pytest.raises(ConfigError, match="CROPS is -1"):
        with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.CROPS", -1))


@torch.no_grad()
def test_adapters_that_are_switched_off_do_not_act():
    model, base = with_objectives("anchor"), base_of()
    pixels = torch.stack([normalised(image["image"]) for image in captioned()])
    on = model.backbone.image_embedding(pixels)
    with lora.switched_off(model.backbone):
        off = model.backbone.image_embedding(pixels)
        with lora.switched_off(model.backbone):
            pass
        assert torch.equal(model.backbone.image_embedding(pixels), off)
    torch.testing.assert_close(off, base.encode_image(pixels), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(on, off, atol=1e-3)
    with pytest.raises(ZeroDivisionError), lora.switched_off(model.backbone):
        raise ZeroDivisionError
    assert torch.equal(model.backbone.image_embedding(pixels), on)
    lora.merge(model.backbone)
    with pytest.raises(ConfigError, match="merged"), lora.switched_off(model.backbone):
        pass


def test_images_are_resized_as_pil_does():
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((160, 90), 3)
    expected = np.asarray(smooth.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    found = resized(torch.from_numpy(np.array(smooth)).permute(2, 0, 1), (64, 64)).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1.5  # PIL rounds twice
