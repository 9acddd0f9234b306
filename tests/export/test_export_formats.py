"""Every tower in every format that has a place for it, loaded by the format's own library."""

import copy
import json
import os
from pathlib import Path

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
from visft.export import hugging_face_folder, peft_folder, place, timm_file, verification
from visft.export import source as sources
from visft.modeling.backbone import CLIPViT, lora, open_clip_models

pytestmark = pytest.mark.usefixtures("in_process")

CLIP, SIGLIP = ("small-vit", "small-quickgelu", "small-layerscale"), ("small-siglip", "small-siglip2")
EVA = ("small-eva01", "small-eva02", "small-eva02-e", "small-pe")


@torch.no_grad()
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
    with torch.no_grad():
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
    with torch.no_grad():
        plain = model.get_image_features(pixel_values=pictures(backbone)).pooler_output
        model = PeftModel.from_pretrained(model, adapter).eval()
        found = model.get_image_features(pixel_values=pictures(backbone)).pooler_output
    assert close(found, embedding(backbone)) and not close(plain, embedding(backbone), 1e-3)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    assert len(adapted) == 6 and all(".vision_model.encoder.layers.1." in n for n in adapted)
    # And merged by peft itself.
    with torch.no_grad():
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
        with torch.no_grad():
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
    if open_clip.get_model_config("visft-tiny")["text_cfg"].get("vocab_size", 49408) != 49408:
        assert not (folder / "vocab.json").exists()
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A dog's life, 42 times!", "zwei Hunde"]
    found = tokenizer(sentences)["input_ids"]
    expected = open_clip.get_tokenizer("visft-tiny")(sentences).tolist()
    assert [row[: len(got)] for row, got in zip(expected, found, strict=True)] == found


def test_a_bare_tower_needs_no_base_where_the_tower_is_all(towers, tmp_path):
    backbone = lora.inject(CLIPViT(open_clip.create_model("small-vit").visual), rank=2)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B, std=0.2)
    with torch.no_grad():
        folder = export.hugging_face(backbone, tmp_path / "hf")
        assert json.loads((folder / "config.json").read_text())["model_type"] == "clip_vision_model"
        assert close(by_transformers(folder, backbone), embedding(backbone))
        assert close(
            by_timm(export.timm(backbone, tmp_path / "t.safetensors"), backbone), embedding(backbone)
        )
        path = export.safetensors(backbone, tmp_path / "v" / "v.safetensors")
        assert all(name.startswith("visual.") for name in load_file(path))
        export.lora(backbone, tmp_path / "peft", layout="peft")


def test_a_bare_timm_tower(tmp_path):
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    backbone = CLIPViT(tower)
    path = export.safetensors(backbone, tmp_path / "v.safetensors")
    assert "visual.trunk.blocks.1.norm1.weight" in load_file(path)
    with torch.no_grad():
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
        with torch.no_grad():
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
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pictures(backbone)).pooler_output
        assert close(found, by_transformers(mixed, backbone))


def test_a_fully_trained_tower_without_its_base_cannot_be_mixed(towers, tmp_path):
    backbone = CLIPViT.from_open_clip("small-vit", train="full")
    with pytest.raises(ExportError, match="The base's weights are gone"):
        export.timm(backbone, tmp_path / "t.safetensors", interpolate=0.5)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_stored_in_16_bits(towers, tmp_path, name, dtype):
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
    with torch.no_grad():
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


# What goes wrong


def _wrong_update(model, base, interpolate, right=sources.tuned):
    for name, tensor in right(model, base, interpolate):
        if name.endswith("resblocks.1.attn.in_proj_weight"):
            tensor[-8:] *= 1.01
        yield name, tensor


@pytest.mark.parametrize("name", WHOLE)
def test_a_wrong_weight_is_noticed_and_leaves_what_was_there(towers, tmp_path, monkeypatch, name):
    backbone, kind = towers.tuned("small-vit"), export.FORMATS[name]
    path = kind.write(backbone, tmp_path / kind.file_name)
    (tmp_path / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(sources, "tuned", _wrong_update)
    with pytest.raises(ExportError, match="computes other embeddings of images"):
        kind.write(backbone, path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not [p for p in tmp_path.rglob(".*") if p.name.endswith(".partial")]


def _wrong_adapter(monkeypatch):
    right = peft_folder._tensors

    def wrong(*arguments):
        tensors = right(*arguments)
        name = next(n for n in tensors if "layers.1" in n and "v_proj.lora_B" in n)
        return tensors | {name: tensors[name] * 1.01}

    monkeypatch.setattr(peft_folder, "_tensors", wrong)


def _wrong_activation(monkeypatch):
    monkeypatch.setitem(hugging_face_folder.ACTIVATIONS, "quick_gelu", "gelu")


def _wrong_pictures(change):
    def harm(monkeypatch):
        right = hugging_face_folder._processor
        monkeypatch.setattr(hugging_face_folder, "_processor", lambda *arguments: right(*arguments) | change)

    return harm


EMBEDDINGS, PIXELS = (
    "computes other embeddings of images",
    "prepares images otherwise|Sizes of tensors must match",
)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("peft", _wrong_adapter, EMBEDDINGS),
        ("hf", _wrong_activation, EMBEDDINGS),
        ("hf", _wrong_pictures({"image_mean": [0.5, 0.5, 0.5]}), PIXELS),
        ("hf", _wrong_pictures({"resample": 2}), PIXELS),
        ("hf", _wrong_pictures({"do_center_crop": False}), PIXELS),
    ],
)
def test_what_the_reader_finds_wrong_is_no_export(towers, tmp_path, monkeypatch, name, harm, reason):
    kind = export.FORMATS[name]
    harm(monkeypatch)
    with pytest.raises(ExportError, match=reason):
        kind.write(towers.tuned("small-quickgelu"), tmp_path / kind.file_name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("tower", ["small-vit", "small-oblong"])
def test_preprocessing_of_each_kind(towers, tmp_path, tower, mode):
    backbone = towers.tuned(tower)
    backbone.tower.preprocess_cfg |= {"resize_mode": mode, "interpolation": "bilinear"}
    for name in ("timm", "hf") if tower == "small-vit" else ("timm",):
        kind = export.FORMATS[name]
        if mode == "longest":
            with pytest.raises(ExportError, match="images are padded"):
                kind.write(backbone, tmp_path / kind.file_name)
        else:
            kind.write(backbone, tmp_path / kind.file_name)
    backbone.tower.preprocess_cfg["mean"] = (0.1, 0.2, 0.3)
    with pytest.raises(ExportError, match="images have mean"):
        export.timm(backbone, tmp_path / "t" / "t.safetensors")


@pytest.mark.parametrize(
    ("name", "tower", "reason"),
    [
        ("timm", "small-coca", "an attentional pooler, which timm's VisionTransformer lacks"),
        ("hf", "small-coca", "an attentional pooler"),
        ("hf", "small-clipa", "averaged tokens"),
        ("hf", "small-oblong", "images of 32 x 48 pixels"),
        ("hf", "small-eva01", "timm's Eva"),
        ("hf", "small-gap", "the pool `avg`"),
        ("peft", "small-pe", "timm's Eva"),
        ("authors", "small-vit", "holds q and v of fused qkv"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(towers, tmp_path, name, tower, reason):
    kind = export.FORMATS[name]
    with pytest.raises(ExportError, match=reason):
        kind.write(towers.tuned(tower), tmp_path / kind.file_name)
    assert os.listdir(tmp_path) == []
    if name != "authors":
        with pytest.raises(ExportError, match=reason):
            export.check(name, open_clip_models.meta_tower(tower))


@pytest.mark.parametrize(
    ("name", "package"), [("hf", "transformers"), ("peft", "peft"), ("onnx", "onnxruntime")]
)
def test_a_missing_package_is_named_with_its_extra(towers, tmp_path, monkeypatch, name, package):
    find = place.importlib.util.find_spec
    monkeypatch.setattr(place.importlib.util, "find_spec", lambda n: None if n == package else find(n))
    kind = export.FORMATS[name]
    with pytest.raises(
        ExportError, match=f"needs {package}, which this environment lacks; install the extra `export`"
    ):
        kind.write(towers.tuned("small-vit"), tmp_path / kind.file_name)
    with pytest.raises(ExportError, match=f"needs {package}"):
        export.check(name, open_clip_models.meta_tower("small-vit"))
    assert os.listdir(tmp_path) == []


def test_a_folder_of_another_model_is_refused(towers, tmp_path):
    for name, tower in (("timm", "small-vit"), ("hf", "small-vit")):
        kind = export.FORMATS[name]
        path = kind.write(towers.tuned(tower), tmp_path / kind.file_name)
        config = path.parent / "config.json" if path.is_file() else path / "config.json"
        config.write_text('{"architecture": "another"}')
        with pytest.raises(ExportError, match="belongs to another architecture"):
            kind.write(towers.tuned(tower), path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file; the format writes a folder"):
        export.hugging_face(towers.tuned("small-vit"), tmp_path / "file")


# Cards and names


def test_the_card_says_what_is_known_and_nothing_else(towers, tmp_path):
    backbone = towers.tuned("small-vit")
    folder = export.hugging_face(backbone, tmp_path / "hf")
    card = (folder / "README.md").read_text()
    assert backbone.base.sha256 in card and "LoRA of rank 2, alpha 2, on q, v of 2 of 2 blocks" in card
    assert "None were measured" in card and "not told to the export" in card
    assert f"transformers {transformers.__version__}" in card and "32 x 32 pixels" in card
    facts = export.Facts(
        data=("coco_2017_train",),
        command="export_backbone.py --weights output",
        figures={"start": {}, "heads": {"a/AP": 1.0}, "lora": {"a/AP": 2.5, "b/AP": None}},
        run="output",
    )
    path = export.timm(backbone, tmp_path / "t" / "t.safetensors", facts=facts, interpolate=0.5)
    card = Path(f"{path}.md").read_text()
    assert "`coco_2017_train`" in card and "| a/AP | 1.00 | 2.50 |" in card and "b/AP" not in card
    assert "0.5 x tuned + 0.5 x base" in card and "| heads | lora |" in card.replace("| | ", "| ", 1)


def test_a_card_of_the_users_own_stays(towers, tmp_path):
    backbone = towers.tuned("small-vit")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "README.md").write_text("mine")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    export.hugging_face(backbone, tmp_path / "hf")
    assert (tmp_path / "hf" / "README.md").read_text() == "mine"
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
    path = export.safetensors(backbone, tmp_path / "v.safetensors")
    card = Path(f"{path}.md")
    ours = card.read_text()
    card.write_text(ours + "old")
    export.safetensors(backbone, path)
    assert card.read_text() == ours


@pytest.mark.parametrize(
    ("name", "expected", "classes"),
    [
        ("ViT-B-32", "vit_base_patch32_clip_224", 512),
        ("ViT-B-16-quickgelu", "vit_base_patch16_clip_quickgelu_224", 512),
        ("ViT-L-14-336-quickgelu", "vit_large_patch14_clip_quickgelu_336", 768),
        ("ViT-B-16-SigLIP", "vit_base_patch16_siglip_224", 0),
        ("EVA02-B-16", "eva02_base_patch16_clip_224", 512),
        ("MobileCLIP2-L-14", "vit_large_patch14_clip_224", 768),
    ],
)
def test_timm_knows_towers_of_real_size_by_name(name, expected, classes):
    found = timm_file.architecture(open_clip_models.meta_tower(name))
    assert found.name.split(".")[0] == expected and found.arguments == {"num_classes": classes}
    if "." in found.name:  # the tag stands for as many outputs: the name alone will do
        with torch.device("meta"):
            assert timm.create_model(found.name).num_classes == classes


def test_the_photographs_are_photographs():
    assert len(verification.PHOTOGRAPHS) == 3
    preprocess = {"size": (64, 48), "mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic"}
    found = verification.photographs({**preprocess, "resize_mode": "squash"})
    assert found.shape == (3, 3, 64, 48) and found.std(dim=(1, 2, 3)).min() > 0.1
