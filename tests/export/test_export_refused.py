"""Exports that are refused or found wrong leave what was there; what a card says; names in timm."""

import os
from pathlib import Path

import pytest
import timm
import torch
import transformers

from visft import export
from visft.errors import ExportError
from visft.export import hugging_face_folder, peft_folder, place, source, timm_file, verification
from visft.modeling.backbone import open_clip_models

pytestmark = pytest.mark.usefixtures("in_process")


def _wrong_update(model, base, interpolate, right=source.tuned):
    for name, tensor in right(model, base, interpolate):
        if name.endswith("resblocks.1.attn.in_proj_weight"):
            tensor[-8:] *= 1.01
        yield name, tensor


@pytest.mark.parametrize("name", ["open_clip", "timm", "hf", "safetensors"])
def test_a_wrong_weight_is_noticed_and_leaves_what_was_there(towers, tmp_path, monkeypatch, name):
    backbone, kind = towers.tuned("small-vit"), export.FORMATS[name]
    path = kind.write(backbone, tmp_path / kind.file_name)
    (tmp_path / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(source, "tuned", _wrong_update)
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
