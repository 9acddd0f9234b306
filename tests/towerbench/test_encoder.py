"""open_clip's own pass at any size: its maps and embeddings are those of visft's CLIPViT, which has another code."""

import pytest
import torch
from families import NATIVE, REFUSED, TIMM, images_for, relative, small_clip

from towerbench.encoder import OpenClipEncoder
from visft.modeling.backbone import CLIPViT, open_clip_models


@pytest.mark.parametrize("name", NATIVE + TIMM)
@torch.no_grad()
def test_maps_and_embeddings_at_the_native_size_and_at_twice_that(name):
    clip = small_clip(name)
    assert OpenClipEncoder.fits(clip.visual)
    encoder, backbone, images = OpenClipEncoder(clip.visual), CLIPViT(clip.visual).eval(), images_for(clip)
    height, width = (2 * side // encoder.stride * encoder.stride for side in images.shape[-2:])
    larger = torch.nn.functional.interpolate(images, (height, width - encoder.stride))
    for batch in (images, larger, images):
        for found, expected in zip(
            encoder.map_and_embedding(batch), backbone.map_and_embedding(batch), strict=True
        ):
            assert found.shape == expected.shape and relative(found, expected) < 1e-4
    assert relative(encoder.map_and_embedding(images)[1], clip.encode_image(images, normalize=False)) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_vision_transformer_has_no_map(name):
    assert not OpenClipEncoder.fits(open_clip_models.meta_tower(name))
