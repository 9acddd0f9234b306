"""Loading with an account of every tensor: what fits loads, what does not is named."""

import copy
import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from visft.checkpoint import load
from visft.checkpoint.run import RunCheckpointer
from visft.checkpoint.run_folder import newest_checkpoint
from visft.errors import CheckpointError
from visft.modeling.backbone import CLIPViT, lora


class Head(nn.Module):
    class_layers = ("classes",)

    def __init__(self, num_classes=3):
        super().__init__()
        self.body, self.classes = nn.Linear(4, 4), nn.Linear(4, num_classes + 1)


class Model(nn.Module):
    """A tower with LoRA, and heads by name, as the meta-architecture has them."""

    def __init__(self, heads=("detection",), num_classes=3, name="visft-tiny"):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = lora.inject(CLIPViT.from_open_clip(name), rank=2, alpha=2.0)
        self.heads = nn.ModuleDict({head: Head(num_classes) for head in heads})

    def train_stage(self, stage, folder):
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("heads.") if stage == "heads" else "lora_" in name)
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        settings = {"lora": {"rank": 2, "alpha": 2.0, "targets": ["q", "v"], "last_blocks": 0}}
        checkpointer = RunCheckpointer(
            folder / stage, self, stage=stage, base=self.backbone.base, settings=settings
        )
        return checkpointer.save(5)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_account_of_every_tensor():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    good = {k: torch.full(v.shape, 2).to(v.dtype) for k, v in module.state_dict().items()}
    report = load.load_into(
        module, {**good, "old.x": torch.zeros(1)}, what="f", ignore={"old.": "of an older layout"}
    )
    assert same(module.state_dict(), good)
    assert sorted(report.loaded) == sorted(good) and report.ignored == {"old.x": "of an older layout"}

    before = copy.deepcopy(module.state_dict())
    bad = {**good, "0.weight": torch.zeros(4, 2), "2.weight": torch.zeros(1)}
    del bad["1.running_mean"]
    with pytest.raises(CheckpointError) as error:
        load.load_into(module, bad, what="weights.pt", hint="Do this.")
    for part in ("weights.pt", "0.weight: [4, 2], expected [3, 2]", "1.running_mean", "2.weight", "Do this."):
        assert part in str(error.value)
    assert same(module.state_dict(), before), "nothing is loaded when something does not fit"


def test_values_are_cast_to_the_modules_type():
    module = nn.Linear(2, 2)
    half = {k: v.half() for k, v in module.state_dict().items()}
    load.load_into(module, half, what="f")
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, half["weight"].float())


def test_heads_of_a_run(tmp_path):
    trained = Model()
    path = trained.train_stage("heads", tmp_path)
    for given in (path, path.parent, tmp_path):
        model = Model()
        load.load_heads(model, [given])
        assert same(model.heads.state_dict(), trained.heads.state_dict())


def test_another_number_of_classes(tmp_path):
    path = Model().train_stage("heads", tmp_path)
    model = Model(num_classes=7)
    fresh = copy.deepcopy(model.heads["detection"].classes.state_dict())
    with pytest.raises(CheckpointError, match=r"classes.weight.*MODEL.VISFT.DETECTION.REINIT_CLASSES"):
        load.load_heads(model, [path])
    report = load.load_heads(model, [path], reinit=["detection"])["detection"]
    assert sorted(report.fresh) == ["classes.bias", "classes.weight"]
    assert same(model.heads["detection"].classes.state_dict(), fresh)
    # REINIT_CLASSES is no licence for other misfits.
    broken = {f"heads.detection.{n}": t for n, t in Head().state_dict().items()}
    broken["heads.detection.body.weight"] = torch.zeros(1, 4)
    safetensors.torch.save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="body.weight"):
        load.load_heads(model, [tmp_path / "broken.safetensors"], reinit=["detection"])


def test_head_files_that_hold_other_heads_or_none(tmp_path, caplog):
    path = Model(heads=("segmentation",)).train_stage("heads", tmp_path)
    with pytest.raises(
        CheckpointError, match="holds weights of the heads segmentation, the model has detection"
    ):
        load.load_heads(Model(), [path])
    both = Model(heads=("segmentation", "detection")).train_stage("heads", tmp_path / "both")
    caplog.set_level("INFO")
    assert load.load_heads(Model(), [both]).keys() == {"detection"}
    assert "ignored the head `segmentation`" in caplog.text
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no head's weights"):
        load.load_heads(Model(), [tmp_path / "x.safetensors"])


def test_run_weights_come_from_both_stages(tmp_path):
    trained = Model()
    trained.train_stage("heads", tmp_path)
    model = Model()
    load.load_run_weights(model, tmp_path)  # LoRA was not trained yet: it stays as it is
    assert same(model.heads.state_dict(), trained.heads.state_dict())
    trained.train_stage("lora", tmp_path)
    load.load_run_weights(model, tmp_path)
    assert same(model.state_dict(), trained.state_dict())
    for path in (tmp_path / "lora", newest_checkpoint(tmp_path / "lora")):
        again = Model()
        load.load_run_weights(again, path)  # with the heads that it was trained through
        assert same(again.state_dict(), trained.state_dict())
    (tmp_path / "heads").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="lacks 4 of the model's tensors .heads.detection.body"):
        load.load_run_weights(Model(), tmp_path / "lora")
    load.load_run_weights(Model(), tmp_path / "lora", optional=("backbone.", "heads."))


def test_alpha_is_compared(tmp_path):
    path = Model().train_stage("lora", tmp_path)
    model = Model()
    model.backbone = lora.inject(CLIPViT.from_open_clip("visft-tiny"), rank=2, alpha=1.0)
    model.backbone.base = None
    with pytest.raises(CheckpointError, match="alpha 2.0, the config says 2 and 1.0"):
        load.load_tower(model.backbone, path)


def test_files_are_checked_before_anything_is_built(tmp_path):
    path = Model().train_stage("heads", tmp_path)
    sha = Model().backbone.base.sha256
    check = {"key": "MODEL.WEIGHTS", "architecture": "visft-tiny", "sha256": sha}
    assert load.check_file(path, **check) == [path]
    assert load.check_file(tmp_path, **check) == [path]
    for given in (path, path.parent, tmp_path):
        assert load.check_file(given, **check, heads_only=True) == [path]

    (tmp_path / "none").mkdir()
    safetensors.torch.save_file({"visual.proj": torch.zeros(1)}, tmp_path / "clip.safetensors")
    for file, more, reason in (
        (tmp_path / "absent.safetensors", {}, "MODEL.WEIGHTS: .*no such weight file"),
        (tmp_path / "none", {}, "no whole checkpoint in this folder"),
        (path, {"architecture": "ViT-B-16"}, "trained on the tower visft-tiny, the config names ViT-B-16"),
        (path, {"sha256": "00" * 32}, "other base weights"),
        (tmp_path / "clip.safetensors", {}, "MODEL.CLIP_VIT.PRETRAINED"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load.check_file(file, **{**check, **more})
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="fetch it again"):
        load.check_file(path, **check)

    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    with pytest.raises(CheckpointError, match="can run code"):
        load.check_file(tmp_path / "code.pkl", **check)
    assert not (tmp_path / "owned").exists()
