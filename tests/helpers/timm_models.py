"""Small models for timm's registry: its own towers, made narrow and shallow. Needs nothing but timm."""

import timm
from timm.models import register_model

_SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}
_MODELS = {
    "test_siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "test_eva01": ("eva_giant_patch14_224", {"img_size": 56}),
    "test_eva02": ("eva02_base_patch16_clip_224", {"img_size": 64}),
    "test_eva02_e": ("eva02_enormous_patch14_clip_224", {"img_size": 56}),
    "test_pe": ("vit_pe_core_base_patch16_224", {"img_size": 64}),
    "test_gap": ("vit_medium_patch16_gap_256", {"img_size": 64}),
}


def _register(name, base, sizes):
    def create(pretrained=False, **options):
        return timm.model_entrypoint(base)(pretrained=pretrained, **{**_SMALL, **sizes, **options})

    create.__name__ = name
    register_model(create)


for _name, (_base, _sizes) in _MODELS.items():
    _register(_name, _base, _sizes)
