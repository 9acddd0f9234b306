"""Contrastive training: open_clip's own loss on the same embeddings, and captions that are no negatives."""

import pytest
import torch
from demo_models import losses_of, picture
from objective_models import assert_close, base_of, captioned, gradients, normalised, with_objectives
from open_clip.loss import ClipLoss

from visft.modeling.backbone import open_clip_models
from visft.modeling.tower_losses import Batch


def embeddings(model, images, captions) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Unit vectors of images by the tuned tower and of captions by open_clip's base, and its logit scale."""
    base = base_of()
    pixels = torch.stack([normalised(image["image"]) for image in images])
    tokens = open_clip_models.open_clip().get_tokenizer("visft-tiny")(captions)
    with torch.no_grad():
        texts = base.encode_text(tokens, normalize=True)
    found = torch.nn.functional.normalize(model.backbone.image_embedding(pixels), dim=-1)
    return found, texts, float(base.logit_scale.detach().exp())


def test_loss_and_gradient_are_open_clips():
    model, images = with_objectives("contrastive"), captioned(4)
    loss = losses_of(model, images)["contrastive/loss"]
    pictures, texts, scale = embeddings(model, images, [image["captions"][0] for image in images])
    expected = ClipLoss()(pictures, texts, scale)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert_close(gradients(model, loss), gradients(model, expected))


def test_images_without_a_caption_take_no_part():
    model, images = with_objectives("contrastive"), captioned(3)
    others = [picture(number=8), picture(number=9) | {"captions": [" "]}]
    found = losses_of(model, [others[0], *images, others[1]])["contrastive/loss"]
    torch.testing.assert_close(found, losses_of(model, images)["contrastive/loss"])
    assert "contrastive/loss" not in losses_of(model, others)


def test_equal_captions_are_no_negatives_of_each_other():
    model, images = with_objectives("contrastive"), captioned(3)
    images[2]["captions"] = [images[0]["captions"][0].upper() + " "]  # the same to the tokenizer
    loss = losses_of(model, images)["contrastive/loss"].detach()
    pictures, texts, scale = embeddings(model, images, [image["captions"][0] for image in images])
    cosines = scale * pictures.detach().double() @ texts.double().T
    against = {0: (0, 1), 1: (0, 1, 2), 2: (1, 2)}
    terms = []
    for i, columns in against.items():
        for line in (cosines[i], cosines[:, i]):
            terms.append(torch.logsumexp(line[list(columns)], 0) - line[i])
    assert float(loss) == pytest.approx(float(sum(terms) / 6), rel=1e-4)


def test_one_caption_is_drawn_for_a_pass():
    model, (image,) = with_objectives("contrastive"), captioned(1)
    image["captions"] = [f"number {i}" for i in range(8)]
    objective = dict(model.objectives.items())["contrastive"]

    def drawn(draw: int) -> str:
        return objective.caption(Batch(model.backbone, [image], lambda rows: None, draw, model.device), 0)

    assert len({drawn(draw) for draw in range(40)}) > 4
    assert drawn(3) == drawn(3)
    # By the forward pass: from the seed.
    images = [image, *captioned(4)[1:]]
    values = [float(losses_of(model, images, seed)["contrastive/loss"].detach()) for seed in (1, 1, 2, 3, 4)]
    assert values[0] == values[1] and len(set(values)) > 2


def test_the_text_tower_is_no_part_of_the_model():
    plain, taught = with_objectives(), with_objectives("contrastive")
    assert list(plain.state_dict()) == list(taught.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), taught.parameters(), strict=True))
    pretrained = with_objectives("contrastive", options=("MODEL.CLIP_VIT.PRETRAINED", "demo"))
    assert not any("text" in name for name in pretrained.state_dict())
    loss = losses_of(pretrained, captioned(4))["contrastive/loss"]
    assert all(g.isfinite().all() for g in gradients(pretrained, loss).values())
