"""Bases as they come from elsewhere: other prefixes, half precision at another size, transformers' layout, damage."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from visft.checkpoint import base_file, open_clip_models
from visft.errors import CheckpointError

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}
SIZES = {"base-small": 32, "base-larger": 48}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    for name, size in SIZES.items():
        vision = SMALL["vision_cfg"] | {"image_size": size}
        for suffix, extra in (("", {}), ("-quickgelu", {"quick_gelu": True})):
            (folder / f"{name}{suffix}.json").write_text(json.dumps(SMALL | {"vision_cfg": vision} | extra))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
            patch.setattr(open_clip.factory, name, getattr(open_clip.factory, name).copy())
        open_clip.add_model_config(folder)
        yield


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    clip = open_clip.create_model("base-small")
    return {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}


def equal(clip, tensors) -> bool:
    state = clip.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "module.model.", "_orig_mod.net.clip."])
def test_prefixes_are_found_by_the_names(tensors, prefix, tmp_path, caplog):
    path = tmp_path / "base.safetensors"
    save_file({prefix + name: t for name, t in tensors.items()} | {"loss.scale": torch.ones(1)}, path)
    with caplog.at_level("INFO", logger="visft.checkpoint.base_file"):
        clip, _ = open_clip_models.create_clip("base-small", str(path))
    assert equal(clip, tensors)
    said = [r.getMessage() for r in caplog.records if r.name == "visft.checkpoint.base_file"]
    assert said == [
        f"{path}: its names begin with `{prefix}`; 1 tensors that do not are ignored (loss.scale, ...)"
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_half_precision_at_another_size_is_resampled_in_float32(tensors, dtype, prefix, tmp_path):
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file({prefix + name: t for name, t in rounded.items()}, tmp_path / "given.safetensors")
    save_file(
        {n: t.float() if t.is_floating_point() else t for n, t in rounded.items()},
        tmp_path / "f32.safetensors",
    )
    clip, _ = open_clip_models.create_clip("base-larger", str(tmp_path / "given.safetensors"))
    expected = open_clip.create_model("base-larger", pretrained=str(tmp_path / "f32.safetensors"))
    assert equal(clip, expected.state_dict())
    assert clip.visual.positional_embedding.shape == (37, 32)


@pytest.mark.parametrize("extra", [0, 1])
def test_positions_of_timms_towers_are_resampled_as_timm_does(extra):
    from timm.layers import resample_abs_pos_embed

    given = torch.randn(1, 16 + extra, 8)
    assert base_file.prefix_tokens(given.shape, (1, 36 + extra, 8)) == extra
    found = base_file._resized_positions(given, (1, 36 + extra, 8), extra)
    expected = resample_abs_pos_embed(given, new_size=[6, 6], old_size=[4, 4], num_prefix_tokens=extra)
    torch.testing.assert_close(found, expected)
    for other in ((1, 16 + extra, 8), (1, 36 + extra, 9), (1, 35 + extra, 8)):
        assert base_file.prefix_tokens(given.shape, other) is None


@pytest.fixture(scope="module")
def theirs():
    """A CLIP of transformers with random weights, by activation."""
    transformers = pytest.importorskip("transformers")

    def make(activation: str):
        common = {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": activation,
        }
        config = transformers.CLIPConfig(
            vision_config={**common, "image_size": 32, "patch_size": 8},
            text_config={**common, "vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99},
            projection_dim=24,
        )
        torch.manual_seed(1)
        return transformers.CLIPModel(config).eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("given", ["folder", "file", "prefixed"])
def test_transformers_clip_is_converted(theirs, activation, given, tmp_path):
    model, folder = theirs(activation), tmp_path / "theirs"
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms that are not 0 and 1
    model.save_pretrained(folder)
    path = folder if given == "folder" else folder / "model.safetensors"
    if given == "prefixed":
        save_file({f"model.{name}": t for name, t in load_file(path).items()}, path)
    clip, base = open_clip_models.create_clip("base-small", str(path))
    assert base.name == ("base-small-quickgelu" if activation == "quick_gelu" else "base-small")
    images = torch.randn(2, 3, 32, 32)
    tokens = torch.randint(1, 99, (3, 8))
    tokens[:, -1] = 99  # the end, where both read the sentence
    vision = model.vision_model(images).pooler_output
    text = model.text_model(tokens).pooler_output
    torch.testing.assert_close(
        clip.encode_image(images), model.visual_projection(vision), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(clip.encode_text(tokens), model.text_projection(text), rtol=1e-4, atol=1e-5)
    assert torch.equal(clip.logit_scale, model.logit_scale)
    if activation == "gelu":
        with pytest.raises(
            CheckpointError, match="says hidden_act gelu, and base-small-quickgelu has QuickGELU"
        ):
            open_clip_models.create_clip("base-small-quickgelu", str(path))


def cases(tensors):
    vision = {name: t for name, t in tensors.items() if name.startswith("visual.")}
    nan = tensors | {"visual.conv1.weight": tensors["visual.conv1.weight"].clone()}
    nan["visual.conv1.weight"][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    wide = tensors | {"visual.conv1.weight": torch.zeros(40, 3, 8, 8)}
    twice = {f"{part}.{name}": t.clone() for part in ("student", "teacher") for name, t in tensors.items()}
    siglip = {
        "vision_model.encoder.layers.0.layer_norm1.weight": torch.ones(3),
        "vision_model.head.probe": torch.ones(3),
    }
    return {
        "nan": (nan, "visual.conv1.weight has 2 of 6144 values that are NaN or infinite"),
        "vision": (vision, "as a whole base-small: it has a vision tower alone, without the text tower;"),
        "wide": (wide, r"visual.conv1.weight has shape \[40, 3, 8, 8\], expected \[32, 3, 8, 8\];"),
        "extra": (
            tensors | {"other": torch.ones(1)},
            r"it has 1 tensors that the architecture has no place for \(other",
        ),
        "bare": ({"blocks.0.norm1.weight": torch.ones(3)}, "it has no names of a vision tower"),
        "twice": (twice, "holds the model twice, under `student.` and `teacher.`"),
        "siglip": (siglip, "is a SigLIP of transformers"),
        "half of it": (
            dict(list(siglip.items())[:1]),
            "is a part of a CLIP of transformers, without text_model.",
        ),
    }


@pytest.mark.parametrize("case", ["nan", "vision", "wide", "extra", "bare", "twice", "siglip", "half of it"])
def test_the_cause_is_named(tensors, case, tmp_path):
    content, words = cases(tensors)[case]
    path = tmp_path / "base.safetensors"
    save_file(content, path)
    with pytest.raises(CheckpointError, match=f"MODEL.CLIP_VIT.PRETRAINED: {path}.*{words}") as caught:
        open_clip_models.create_clip("base-small", str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_without_one_weight_file(tmp_path):
    with pytest.raises(CheckpointError, match="none of model.safetensors, .* is in it"):
        open_clip_models.create_clip("base-small", str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in several parts \(model.safetensors.index.json\)"):
        open_clip_models.create_clip("base-small", str(tmp_path))
