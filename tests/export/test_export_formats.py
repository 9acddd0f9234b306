"""Every tower in every format that has a place for it, loaded by the format's own library."""

import copy
import json

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.model import _build_vision_tower
from peft import PeftModel
from safetensors.torch import load_file
from small_towers import close, pictures
from torch import nn

from visft import export
from visft.errors import ExportError
from visft.export import source as sources
from visft.export import verification
from visft.modeling.backbone import CLIPViT, lora


@pytest.fixture(autouse=True)
def _quick(in_process):
    with torch.no_grad():
        yield


CLIP, SIGLIP = ("small-vit", "small-quickgelu", "small-layerscale"), ("small-siglip", "small-siglip2")
EVA = ("small-eva01", "small-eva02", "small-eva02-e", "small-pe")


def embedding(backbone):
    return backbone.image_embedding(pictures(backbone))


# What a user of each library does.


def by_timm(path, backbone):
    config = json.loads((path.parent / "config.json").read_text())
    arguments = {"num_classes": config["num_classes"], **config["model_args"]}
    model = timm.create_model(config["architecture"], checkpoint_path=str(path), **arguments)
    return model.eval()(pictures(backbone))


def by_transformers(path, backbone):
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(path).eval()
    if name == "CLIPVisionModelWithProjection":
        return model(pixel_values=pictures(backbone)).image_embeds
    if name == "SiglipVisionModel":
        return model(pixel_values=pictures(backbone)).pooler_output
    features = model.get_image_features(pixel_values=pictures(backbone))
    return getattr(features, "pooler_output", features)


def by_open_clip_tower(path, backbone):
    config = open_clip.get_model_config(backbone.base.name)
    tower = _build_vision_tower(
        config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
    ).eval()
    tower.load_state_dict({n.removeprefix("visual."): t for n, t in load_file(path).items()})
    found = tower(pictures(backbone))
    return found[0] if isinstance(found, tuple) else found


def by_open_clip(path, backbone):
    clip = open_clip.create_model(backbone.base.name, pretrained=str(path)).eval()
    return clip.encode_image(pictures(backbone), normalize=False)


USERS = {
    "open_clip": by_open_clip,
    "timm": by_timm,
    "hf": by_transformers,
    "safetensors": by_open_clip_tower,
}
WHOLE = tuple(USERS)
FITTING = [
    *(
        ("open_clip", t)
        for t in ("small-oblong", "small-siglip", "small-coca", "small-eva01", "small-eva02", "small-eva02-e")
    ),
    *(("timm", tower) for tower in (*CLIP, "small-oblong", "small-clipa", "small-siglip", *EVA, "small-gap")),
    *(("hf", tower) for tower in (*CLIP, *SIGLIP)),
    *(("safetensors", tower) for tower in ("small-vit", "small-coca", "small-siglip", "small-eva02")),
]


def test_a_random_coca_has_no_memory_in_it(towers):
    def drawn() -> dict[str, torch.Tensor]:
        # What is freed here is what uninitialised parameters would find.
        junk = [torch.full((size,), float("nan")) for size in (256, 768, 1024, 4096) for _ in range(500)]
        del junk
        torch.manual_seed(0)
        return CLIPViT.from_open_clip("small-coca").base_clip().state_dict()

    first, second = drawn(), drawn()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "tower"), FITTING)
def test_a_tower_in_a_format(towers, tmp_path, name, tower):
    backbone = towers.tuned(tower).train()
    before, modes = copy.deepcopy(backbone.state_dict()), {n: m.training for n, m in backbone.named_modules()}
    kind = export.FORMATS[name]
    path = kind.write(backbone, tmp_path / kind.file_name)
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert close(USERS[name](path, backbone.eval()), embedding(backbone))
    # LoRA is worth seeing: an export without it would not pass.
    plain = verification.embed_state(backbone.tower, pictures(backbone), {})
    assert not close(plain, embedding(backbone), 1e-4)
    after = backbone.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before) and not lora.is_merged(backbone)


@pytest.mark.parametrize("tower", [*CLIP, "small-siglip"])
def test_peft_loads_the_adapter_over_the_base_of_transformers(towers, tmp_path, tower):
    backbone = CLIPViT.from_open_clip(tower)
    towers.randomise(backbone.base_clip())
    targets = ("q", "k", "v", "proj", "fc1", "fc2")
    lora.inject(backbone, rank=3, alpha=2.0, targets=targets, last_blocks=1)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B, std=0.2)
    base = export.hugging_face(backbone, tmp_path / "base", interpolate=0.0)
    adapter = export.lora(backbone, tmp_path / "adapter", layout="peft")
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base)
    plain = model.get_image_features(pixel_values=pictures(backbone)).pooler_output
    model = PeftModel.from_pretrained(model, adapter).eval()
    found = model.get_image_features(pixel_values=pictures(backbone)).pooler_output
    assert close(found, embedding(backbone)) and not close(plain, embedding(backbone), 1e-3)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    assert len(adapted) == 6 and all(".vision_model.encoder.layers.1." in n for n in adapted)
    # And merged by peft itself.
    found = model.merge_and_unload().get_image_features(pixel_values=pictures(backbone)).pooler_output
    assert close(found, embedding(backbone))


def test_texts_and_scales_are_the_bases_in_transformers_too(towers, tmp_path):
    for tower, name in (("small-quickgelu", "CLIPModel"), ("small-siglip2", "SiglipModel")):
        backbone = towers.tuned(tower)
        clip = backbone.base_clip()
        folder = export.hugging_face(backbone, tmp_path / tower)
        model = getattr(transformers, name).from_pretrained(folder).eval()
        texts = torch.randint(1, 99, (3, 8))
        texts[:, 5] = 99  # the end of a text
        found = model.get_text_features(input_ids=texts).pooler_output
        assert close(found, clip.encode_text(texts, normalize=False))
        assert model.logit_scale.item() == clip.logit_scale.item()
        if name == "SiglipModel":
            assert model.logit_bias.item() == clip.logit_bias.item()
    config = json.loads((tmp_path / "small-quickgelu" / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == config["text_config"]["hidden_act"] == "quick_gelu"


def test_openais_tokenizer_comes_with_a_tower_that_uses_it(tmp_path):
    backbone = CLIPViT.from_open_clip("visft-tiny", "demo")
    folder = export.hugging_face(backbone, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A dog's life, 42 times!", "zwei Hunde"]
    found = tokenizer(sentences)["input_ids"]
    expected = open_clip.get_tokenizer("visft-tiny")(sentences).tolist()
    assert [row[: len(got)] for row, got in zip(expected, found, strict=True)] == found


def test_a_bare_tower_needs_no_base_where_the_tower_is_all(towers, tmp_path):
    backbone = lora.inject(CLIPViT(open_clip.create_model("small-vit").visual), rank=2)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B, std=0.2)
    folder = export.hugging_face(backbone, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip_vision_model"
    assert close(by_transformers(folder, backbone), embedding(backbone))
    assert close(by_timm(export.timm(backbone, tmp_path / "t.safetensors"), backbone), embedding(backbone))
    path = export.safetensors(backbone, tmp_path / "v" / "v.safetensors")
    assert all(name.startswith("visual.") for name in load_file(path))
    export.lora(backbone, tmp_path / "peft", layout="peft")


def test_a_bare_timm_tower(tmp_path):
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    backbone = CLIPViT(tower)
    path = export.safetensors(backbone, tmp_path / "v.safetensors")
    assert "visual.trunk.blocks.1.norm1.weight" in load_file(path)
    found = by_timm(export.timm(backbone, tmp_path / "t" / "t.safetensors"), backbone)
    assert close(found, embedding(backbone))
    with pytest.raises(ExportError, match="bare tower and the format needs the whole CLIP"):
        export.open_clip(backbone, tmp_path / "o.safetensors")
    with pytest.raises(ExportError, match="have no place for timm's VisionTransformer with the pool `token`"):
        export.hugging_face(backbone, tmp_path / "hf")


# Mixtures, precision


@pytest.mark.parametrize("name", WHOLE)
def test_mixtures_with_the_base(towers, tmp_path, name):
    backbone = towers.tuned("small-quickgelu")
    base, full = backbone.base_clip().visual, sources.resolve(backbone, None, 1.0, whole=True).state
    kind, images = export.FORMATS[name], pictures(backbone)
    plain = {n: t.detach() for n, t in base.state_dict().items() if not n.endswith(("lora_A", "lora_B"))}
    for amount in (0.0, 0.25):
        path = kind.write(backbone, tmp_path / f"{amount}" / kind.file_name, interpolate=amount)
        mixture = {n: (1 - amount) * plain[n] + amount * full[n] for n in plain}
        expected = torch.func.functional_call(base, mixture, (images,))
        assert close(USERS[name](path, backbone), expected)
        assert not close(expected, embedding(backbone), 1e-3)
    with pytest.raises(ExportError, match="interpolate is 1.5; expected 0"):
        kind.write(backbone, tmp_path / "x" / kind.file_name, interpolate=1.5)
    assert not (tmp_path / "x").exists()


def test_a_mixture_of_lora_scales_its_update(towers, tmp_path):
    backbone = towers.tuned("small-vit")
    base = export.hugging_face(backbone, tmp_path / "base", interpolate=0.0)
    half = export.lora(backbone, tmp_path / "peft", layout="peft", interpolate=0.5)
    mixed = export.hugging_face(backbone, tmp_path / "mixed", interpolate=0.5)
    model = PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained(base), half).eval()
    found = model.get_image_features(pixel_values=pictures(backbone)).pooler_output
    assert close(found, by_transformers(mixed, backbone))


def test_a_fully_trained_tower_without_its_base_cannot_be_mixed(towers, tmp_path):
    backbone = CLIPViT.from_open_clip("small-vit", train="full")
    with pytest.raises(ExportError, match="The base's weights are gone"):
        export.timm(backbone, tmp_path / "t.safetensors", interpolate=0.5)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_weights_stored_in_fewer_bits(towers, tmp_path, name, dtype):
    torch.manual_seed(0)
    clip = open_clip.create_model("small-quickgelu")
    towers.randomise(clip)
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    low = towers.tuned("small-quickgelu", pretrained=str(tmp_path / "base.pt"), frozen_dtype=dtype)
    high = towers.tuned("small-quickgelu", pretrained=str(tmp_path / "base.pt"))
    kind = export.FORMATS[name]
    # In an autocast region, as a training loop with AMP is.
    with torch.autocast("cpu", torch.bfloat16):
        path = kind.write(low, tmp_path / kind.file_name)
    assert close(USERS[name](path, high), embedding(high))
    weights = path / "model.safetensors" if path.is_dir() else path
    found = load_file(weights)
    assert {t.dtype for t in found.values()} == {torch.float32}
    untouched = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert untouched not in found or torch.equal(found[untouched], clip.state_dict()[untouched])


@pytest.mark.parametrize("name", WHOLE)
def test_with_b_zero_the_base_itself_is_written(towers, tmp_path, name):
    backbone = CLIPViT.from_open_clip("small-quickgelu")
    kind = export.FORMATS[name]
    plain = kind.write(backbone, tmp_path / "plain" / kind.file_name)
    lora.inject(backbone, rank=2)
    with_lora = kind.write(backbone, tmp_path / "lora" / kind.file_name)
    files = [path / "model.safetensors" if path.is_dir() else path for path in (plain, with_lora)]
    left, right = map(load_file, files)
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    if name == "open_clip":
        base = backbone.base_clip().state_dict()
        assert all(torch.equal(tensor, base[n]) for n, tensor in left.items())


@pytest.mark.parametrize("name", [*WHOLE, "peft", "lora"])
def test_merged_or_not_is_the_same(towers, tmp_path, name):
    backbone, kind = towers.tuned("small-quickgelu"), export.FORMATS[name]
    paths = [kind.write(backbone, tmp_path / "not" / kind.file_name)]
    lora.merge(backbone)
    before = copy.deepcopy(backbone.state_dict())
    paths.append(kind.write(backbone, tmp_path / "merged" / kind.file_name))
    after = backbone.state_dict()
    assert lora.is_merged(backbone) and all(torch.equal(before[n], after[n]) for n in before)
    inside = {"hf": "model.safetensors", "peft": "adapter_model.safetensors"}.get(name, "")
    left, right = (load_file(path / inside if inside else path) for path in paths)
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
