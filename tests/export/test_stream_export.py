"""`tools/export_backbone.py` on the authors' LoRA: from file to file, without a model."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
import golden  # noqa: E402
import open_clip  # noqa: E402
import small_eva  # noqa: E402

from visft import export  # noqa: E402
from visft.checkpoint import files as files_module  # noqa: E402
from visft.checkpoint import load, run_folder  # noqa: E402
from visft.commands import export_backbone  # noqa: E402
from visft.export import stream_export  # noqa: E402
from visft.modeling.backbone import CLIPViT, lora  # noqa: E402

WIDTH, DEPTH = 32, 3


@pytest.fixture(scope="module")
def name():
    return small_eva.register(WIDTH, DEPTH)


@pytest.fixture
def base(name):
    return small_eva.draw(name)


@pytest.fixture
def adapters(tmp_path):
    tensors = small_eva.draw_lora(WIDTH, DEPTH)
    torch.save(tensors, tmp_path / "eva_x_lora_5000.pt")
    return tensors


def tool(
    tmp_path,
    name,
    base_file,
    *more,
    fmt="open_clip",
    weights="eva_x_lora_5000.pt",
    output="out/f.safetensors",
    rank=4,
):
    words = ["--weights", tmp_path / weights, "--format", fmt, "--output", tmp_path / output, *more]
    words += ["MODEL.CLIP_VIT.NAME", name] if name else []
    words += ["MODEL.LORA.RANK", rank, "MODEL.CLIP_VIT.PRETRAINED", base_file]
    return export_backbone.main([str(word) for word in words])


def fails(capsys, *arguments, **options):
    status = tool(*arguments, **options)
    error = capsys.readouterr().err.strip()
    assert status == 1 and "Traceback" not in error
    return error.splitlines()[-1]


def no_model(monkeypatch):
    """Building one is an error from here on."""

    def refuse(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(CLIPViT, "from_open_clip", refuse)


@pytest.mark.parametrize(
    "kind", ["open_clip.safetensors", "open_clip.pt", "eva.pt", "eva.safetensors", "half.pt"]
)
def test_the_authors_lora_is_merged_into_a_file_that_open_clip_loads(
    tmp_path, monkeypatch, name, base, adapters, kind
):
    tensors = {n: t.half() for n, t in base.items()} if "half" in kind else base
    tensors = tensors if "open_clip" in kind else small_eva.eva_clip_names(tensors)
    save_file(tensors, tmp_path / kind) if kind.endswith(".safetensors") else torch.save(
        tensors, tmp_path / kind
    )
    no_model(monkeypatch)
    assert tool(tmp_path, name, tmp_path / kind) == 0
    monkeypatch.undo()
    files = sorted(os.listdir(tmp_path / "out"))
    assert files == ["f.safetensors", "f.safetensors.md", "open_clip_config.json"]
    card = (tmp_path / "out" / "f.safetensors.md").read_text()
    assert (
        f"LoRA of rank 4, alpha 1, on q, v of {DEPTH} of {DEPTH} blocks" in card
        and str(tmp_path / kind) in card
    )
    assert files_module.sha256(tmp_path / kind) in card and "reading it back, tensor by tensor" in card

    stored = {n: t.half() for n, t in base.items()} if "half" in kind else base
    expected, found = small_eva.merged(stored, adapters), load_file(tmp_path / "out" / "f.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if ".qkv.weight" in key:
            assert (tensor.double() - expected[key]).abs().max() < 1e-6
            assert torch.equal(tensor[WIDTH : 2 * WIDTH], stored[key][WIDTH : 2 * WIDTH].float()), (
                "k is untouched"
            )
        else:
            assert tensor.dtype == stored[key].dtype and torch.equal(tensor, stored[key])
    # Loaded strictly by open_clip, it embeds as the base with LoRA beside its weights.
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    plain = open_clip.create_model(name).eval()
    plain.load_state_dict({n: t.float() for n, t in stored.items()})
    backbone = lora.inject(CLIPViT(plain.visual), rank=4, alpha=1.0)
    load.load_tower(backbone, tmp_path / "eva_x_lora_5000.pt")
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        want, got = backbone.image_embedding(images), clip.encode_image(images)
        lora.state_dict(backbone)
        for site in lora.sites(backbone):
            site.adapter.lora_B.zero_()
        assert (backbone.image_embedding(images) - want).norm() > 1e-2 * want.norm(), (
            "LoRA would not be tested"
        )
    assert (want - got).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("flavour", golden.FLAVOURS)
def test_a_merged_golden_tower_gives_the_golden_features(tmp_path, flavour):
    """A bare tower without class token and projection, as the layout of the golden pack lists it."""
    pack = golden.Pack(flavour)
    weights = {n.removeprefix(golden.TOWER): t for n, t in pack.weights(golden.TOWER).items()}
    width, hidden = weights["blocks.0.mlp.fc1.weight"].shape[1], len(weights["blocks.0.mlp.fc1.weight"])
    ratio = (hidden + 0.5) / width
    name = small_eva.register(
        width, pack.depth, ratio=ratio, heads=pack.num_heads, post_norm=flavour == "e", image_size=224
    )
    torch.save({f"visual.{n}": t for n, t in weights.items() if "lora" in n}, tmp_path / "eva_x_lora_5000.pt")
    torch.save({n: t for n, t in weights.items() if "lora" not in n}, tmp_path / "eva_vit.pth")
    rank = len(weights["blocks.0.attn.qkv.lora_A"]) // 2
    words = ["--weights", tmp_path / "eva_x_lora_5000.pt", "--format", "safetensors"]
    words += ["--output", tmp_path / "f.safetensors", "MODEL.CLIP_VIT.NAME", name, "MODEL.LORA.RANK", rank]
    assert (
        export_backbone.main(
            [str(w) for w in [*words, "MODEL.CLIP_VIT.PRETRAINED", tmp_path / "eva_vit.pth"]]
        )
        == 0
    )
    merged = load_file(tmp_path / "f.safetensors")
    assert all(n.startswith("visual.trunk.") for n in merged)
    backbone = pack.backbone(with_lora=False)
    state = {f"tower.{n.removeprefix('visual.trunk.')}": t for n, t in merged.items()}
    missing, unknown = backbone.load_state_dict(state, strict=False)
    assert missing == ["tower.cls_token"] and not unknown
    with torch.no_grad():
        features = backbone(pack.batch())["last_feat"]
    assert (features - pack.tensors["features"]).abs().max() < 1e-4


def test_a_bare_tower_becomes_timm_but_not_open_clip(tmp_path, capsys, name, base, adapters):
    import timm

    torch.save(small_eva.bare_names(base), tmp_path / "eva_vit_g.pth")
    error = fails(capsys, tmp_path, name, tmp_path / "eva_vit_g.pth")
    assert "bare tower" in error and "can become timm or safetensors, not open_clip" in error
    assert not (tmp_path / "out").exists()
    assert tool(tmp_path, name, tmp_path / "eva_vit_g.pth", fmt="timm") == 0
    path = tmp_path / "out" / "f.safetensors"
    tower = timm.create_model(name, checkpoint_path=str(path), num_classes=24, img_size=28)
    expected = small_eva.bare_names(small_eva.merged(base, adapters))
    assert all((t.double() - expected[n]).abs().max() < 1e-6 for n, t in tower.state_dict().items())
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["architecture"] == name and about["num_classes"] == 24
    # Without the projection there are no classes; without anything else it is refused.
    headless = {n: t for n, t in small_eva.bare_names(base).items() if not n.startswith("head.")}
    torch.save(headless, tmp_path / "headless.pth")
    assert tool(tmp_path, name, tmp_path / "headless.pth", fmt="timm") == 0
    timm.create_model(name, checkpoint_path=str(path), num_classes=0, img_size=28)
    del headless["norm.weight"]
    torch.save(headless, tmp_path / "headless.pth")
    assert "norm.weight" in fails(capsys, tmp_path, name, tmp_path / "headless.pth", fmt="timm")


def test_verify_lets_open_clip_load_the_file_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    """A tower that timm itself has: the process knows nothing of ours."""
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    vision = {
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_pool": "token",
        "timm_proj": None,
        "image_size": 224,
    }
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    (tmp_path / "test-tiny-eva.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "test-tiny-eva.json")
    torch.save(small_eva.draw_lora(192, 12), tmp_path / "eva_x_lora_5000.pt")
    save_file(small_eva.draw("test-tiny-eva"), tmp_path / "base.safetensors")
    run = (tmp_path, "test-tiny-eva", tmp_path / "base.safetensors", "--verify")
    assert tool(*run) == 0
    assert tool(*run, fmt="timm", output="timm/f.safetensors") == 0
    before = (tmp_path / "out" / "f.safetensors").read_bytes()
    # A file that open_clip loads otherwise than it is written is no success, and what was there stays.
    right = stream_export._described

    def described(*arguments):
        name, content, *rest = right(*arguments)
        return name, {**content, "model_cfg": {**content["model_cfg"], "embed_dim": 25}}, *rest

    monkeypatch.setattr(stream_export, "_described", described)
    assert "does not load the export" in fails(capsys, *run)
    assert (tmp_path / "out" / "f.safetensors").read_bytes() == before
    assert len(os.listdir(tmp_path / "out")) == 3


def test_other_formats_over_a_base_with_eva_clips_names(tmp_path, name, base, adapters):
    """The model is built then; LoRA alone goes to our layout, and names its base."""
    torch.save(small_eva.eva_clip_names(base), tmp_path / "eva.pt")
    assert tool(tmp_path, name, tmp_path / "eva.pt", fmt="lora") == 0
    found = load_file(tmp_path / "out" / "f.safetensors")
    a = adapters["visual.blocks.1.attn.qkv.lora_A"]
    assert torch.equal(found["backbone.tower.trunk.blocks.1.lora.v.lora_A"], a[4:])
    about = run_folder.describe(tmp_path / "out" / "f.safetensors")
    assert about["base"]["name"] == name and about["base"]["pretrained"] == str(tmp_path / "eva.pt")


def test_interpolation(tmp_path, name, base, adapters):
    save_file(base, tmp_path / "base.safetensors")
    assert tool(tmp_path, name, tmp_path / "base.safetensors", "--interpolate", "0", "0.25") == 0
    whole, key = small_eva.merged(base, adapters), "visual.trunk.blocks.1.attn.qkv.weight"
    found = {amount: load_file(tmp_path / "out" / f"f-{amount}.safetensors") for amount in ("0.00", "0.25")}
    assert all(torch.equal(found["0.00"][n], t) for n, t in base.items())
    quarter = base[key].double() + 0.25 * (whole[key] - base[key].double())
    assert (found["0.25"][key].double() - quarter).abs().max() < 1e-6


def test_our_lora_over_a_large_base_goes_the_same_way(tmp_path, monkeypatch, name, base, adapters):
    """What is streamed is what is built, to the bit; and the authors' layout of it too."""
    save_file(base, tmp_path / "base.safetensors")
    backbone = lora.inject(
        CLIPViT.from_open_clip(name, str(tmp_path / "base.safetensors")), rank=4, alpha=3.0
    )
    for site in lora.sites(backbone):
        torch.nn.init.normal_(site.adapter.lora_B)
    export.lora(backbone, tmp_path / "ours.safetensors")
    export.lora(backbone, tmp_path / "theirs.pt", layout="authors")
    lora.merge(backbone)
    built = {f"visual.trunk.{n}": t for n, t in backbone.tower.state_dict().items() if "lora" not in n}
    built = {n.replace("visual.trunk.trunk.", "visual.trunk."): t for n, t in built.items()}
    no_model(monkeypatch)
    monkeypatch.setattr(stream_export, "LARGE", 0)
    words = ("--format", "open_clip", "--output", tmp_path / "ours" / "f.safetensors")
    assert export_backbone.main([str(w) for w in ("--weights", tmp_path / "ours.safetensors", *words)]) == 0
    ours = load_file(tmp_path / "ours" / "f.safetensors")
    assert all(torch.equal(ours[n], t) for n, t in built.items())
    assert ours.keys() == base.keys()
    assert tool(tmp_path, name, tmp_path / "base.safetensors", weights="theirs.pt") == 0
    theirs = load_file(tmp_path / "out" / "f.safetensors")
    assert all((theirs[n] - t).abs().max() < 1e-6 for n, t in ours.items())


def test_bases_and_lora_that_do_not_fit_are_refused_by_name_and_shape(tmp_path, capsys, name, base, adapters):
    def refused(tensors, fmt="open_clip", **options):
        torch.save(tensors, tmp_path / "base.pt")
        return fails(capsys, tmp_path, name, tmp_path / "base.pt", fmt=fmt, **options)

    wide = small_eva.draw(small_eva.register(64, DEPTH))
    error = refused(wide)
    assert "visual.trunk" in error and "64" in error and "32" in error and name in error
    deep = small_eva.draw(small_eva.register(WIDTH, DEPTH + 1))
    assert f"visual.trunk.blocks.{DEPTH}." in refused(deep)
    shallow = small_eva.draw(small_eva.register(WIDTH, DEPTH - 1))
    assert f"lacks 13 of the tensors of {name} (visual.trunk.blocks.{DEPTH - 1}." in refused(shallow)
    assert "no vision tower that is known here" in refused({"encoder.weight": torch.zeros(2, 2)})
    assert "has 1 tensors that" in refused({**base, "visual.trunk.extra": torch.zeros(1)})
    narrow_text = {**base, "text.ln_final.weight": torch.zeros(16)}
    assert "text.ln_final.weight has shape [16]" in refused(narrow_text)

    good = tmp_path / "good.safetensors"
    save_file(base, good)

    def refused_lora(tensors, *more):
        torch.save(tensors, tmp_path / "bad.pt")
        return fails(capsys, tmp_path, name, good, *more, weights="bad.pt")

    missing = {n: t for n, t in adapters.items() if n != "visual.blocks.1.attn.qkv.lora_B"}
    assert "lacks lora_A or lora_B of block 1" in refused_lora(missing)
    other = {**adapters, "visual.blocks.1.attn.qkv.lora_B": torch.zeros(2 * WIDTH, 3)}
    assert "visual.blocks.1.attn.qkv.lora_B has shape [64, 3]" in refused_lora(other)
    assert "tensors that are not LoRA's (visual.norm.weight)" in refused_lora(
        {**adapters, "visual.norm.weight": torch.zeros(2)}
    )
    fewer = {n: t for n, t in adapters.items() if ".2." not in n}
    assert f"is for a tower of 2 blocks and width 32, MODEL.CLIP_VIT.NAME {name} has 3" in refused_lora(fewer)
    nan = {n: t.clone() for n, t in adapters.items()}
    nan["visual.blocks.2.attn.qkv.lora_A"][0, 0] = float("nan")
    assert "is not finite" in refused_lora(nan)
    assert not (tmp_path / "out" / "f.safetensors").exists() and os.listdir(tmp_path / "out") == []


def test_a_config_that_disagrees_is_refused(tmp_path, capsys, name, base, adapters):
    save_file(base, tmp_path / "base.safetensors")

    def refused(text, rank=4):
        (tmp_path / "config.yaml").write_text(text)
        words = ("--config-file", tmp_path / "config.yaml")
        return fails(capsys, tmp_path, None, tmp_path / "base.safetensors", *words, rank=rank)

    assert "MODEL.CLIP_VIT.NAME ViT-B-16" in refused("MODEL: {CLIP_VIT: {NAME: ViT-B-16}}")
    node = f"MODEL: {{CLIP_VIT: {{NAME: {name}}}, LORA: "
    assert "q and v of all blocks" in refused(node + "{TARGETS: [q, k]}}")
    assert "LAST_BLOCKS 2" in refused(node + "{LAST_BLOCKS: 2}}")
    assert "has rank 4, MODEL.LORA.RANK is 8" in refused(node + "{RANK: 8}}", rank=8)


def test_the_architecture_comes_from_the_shapes(tmp_path, capsys, base):
    """The authors' two towers; LoRA of rank 1 is a small file even for them."""
    save_file(base, tmp_path / "base.safetensors")
    for width, depth, tower in ((1408, 40, "EVA01-g-14"), (1792, 64, "EVA02-E-14-plus")):
        torch.save(small_eva.draw_lora(width, depth, rank=1), tmp_path / "eva.pt")
        words = [
            "--weights",
            tmp_path / "eva.pt",
            "--format",
            "open_clip",
            "--output",
            tmp_path / "o.safetensors",
        ]
        words += ["MODEL.CLIP_VIT.PRETRAINED"]
        assert export_backbone.main([str(w) for w in [*words, tmp_path / "base.safetensors"]]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "has shape" in error and tower in error and str(width) in error
        # The same towers with other text towers: told by the base.
        assert export_backbone.main([str(w) for w in [*words, "no-such-tag"]]) == 1
        assert f"nor a tag of {tower}" in capsys.readouterr().err.replace("neither a file ", "")
    torch.save(small_eva.draw_lora(96, 3), tmp_path / "eva.pt")
    assert export_backbone.main([str(w) for w in [*words, tmp_path / "base.safetensors"]]) == 1
    assert "its shapes fit none or several" in capsys.readouterr().err


def test_a_tag_that_cannot_be_downloaded_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.save(small_eva.draw_lora(1408, 40, rank=1), tmp_path / "eva.pt")
    words = [
        "--weights",
        tmp_path / "eva.pt",
        "--format",
        "open_clip",
        "--output",
        tmp_path / "o.safetensors",
    ]
    words += ["MODEL.CLIP_VIT.PRETRAINED", "laion400m_s11b_b41k"]
    assert export_backbone.main([str(w) for w in words]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "laion400m_s11b_b41k" in error and "EVA01-g-14 could not be downloaded" in error


class Code:
    """Pickled into a file, it makes a folder when unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_broken_and_dangerous_files(tmp_path, capsys, name, base, adapters):
    save_file(base, tmp_path / "base.safetensors")
    for kind in ("base.safetensors", "base.pt"):
        path = tmp_path / kind
        save_file(base, path) if kind.endswith("s") else torch.save(base, path)
        os.truncate(path, path.stat().st_size // 2)
        error = fails(capsys, tmp_path, name, path)
        assert str(path) in error and "cut off" in error
    bad = tmp_path / "code.pt"
    torch.save({**base, "x": Code(tmp_path / "owned")}, bad)
    assert "can run code" in fails(capsys, tmp_path, name, bad)
    bad.write_bytes(pickle.dumps({"x": Code(tmp_path / "owned")}, protocol=2))
    assert "can run code" in fails(capsys, tmp_path, name, bad)
    save_file(base, tmp_path / "base.safetensors")
    torch.save({**adapters, "x": Code(tmp_path / "owned")}, tmp_path / "eva_x_lora_5000.pt")
    assert "can run code" in fails(capsys, tmp_path, name, tmp_path / "base.safetensors")
    assert not (tmp_path / "owned").exists()
    same = tmp_path / "base.safetensors"
    torch.save(adapters, tmp_path / "eva_x_lora_5000.pt")
    assert "is the base itself" in fails(capsys, tmp_path, name, same, output="base.safetensors")
    assert not list(tmp_path.rglob("*.partial"))


# Of their own process: peak memory, and a kill

PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import small_eva
small_eva.register(384, int(sys.argv[2]), heads=6)
from visft.commands import export_backbone
status = export_backbone.main(sys.argv[3:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(status)
"""


def command(tmp_path, depth, base_file, output):
    words = ["--weights", tmp_path / f"lora_{depth}.pt", "--format", "open_clip", "--output", output]
    words += ["MODEL.CLIP_VIT.NAME", f"test_eva_384_{depth}", "MODEL.LORA.RANK", 4]
    words += ["MODEL.CLIP_VIT.PRETRAINED", base_file]
    return [sys.executable, "-c", PROCESS, str(ROOT / "tests" / "helpers"), str(depth), *map(str, words)]


@pytest.fixture(scope="module")
def two_depths(tmp_path_factory):
    """Towers of 4 and 24 blocks: files of 29 and 170 MB."""
    folder = tmp_path_factory.mktemp("depths")
    for depth in (4, 24):
        tensors = small_eva.draw(small_eva.register(384, depth, heads=6))
        save_file(tensors, folder / f"base_{depth}.safetensors")
        torch.save(small_eva.eva_clip_names(tensors), folder / f"base_{depth}.pt")
        torch.save(small_eva.draw_lora(384, depth), folder / f"lora_{depth}.pt")
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_peak_memory_does_not_grow_with_the_tower(two_depths, suffix):
    peaks = {}
    for depth in (4, 24):
        run = command(
            two_depths,
            depth,
            two_depths / f"base_{depth}{suffix}",
            two_depths / f"o{depth}" / "f.safetensors",
        )
        result = subprocess.run(run, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks[depth] = int(result.stdout.split()[-1]) / 1024
    # 141 MB more in the file. What is mapped is given back after 32 MB, which the smaller file does not reach.
    assert peaks[24] - peaks[4] < 40, peaks


def test_a_killed_export_leaves_nothing_at_its_target(two_depths, tmp_path):
    target = tmp_path / "out" / "f.safetensors"
    run = command(two_depths, 24, two_depths / "base_24.safetensors", target)
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(file.stat().st_size for file in tmp_path.glob("out/.f.safetensors.*.partial/f.safetensors")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [file.suffix for file in target.parent.iterdir()] == [".partial"]
    target.write_bytes(b"what the user had")
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(target.parent)) == ["f.safetensors", "f.safetensors.md", "open_clip_config.json"]
    assert len(load_file(target)) == len(load_file(two_depths / "base_24.safetensors"))
