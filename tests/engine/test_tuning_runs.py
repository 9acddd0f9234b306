"""Whole runs that tune all of the tower, or heads and tower in one stage: killed, resumed, exported, evaluated."""

import json
import time

import open_clip
import processes
import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import refused
from tiny_run import tiny_arguments

from visft.errors import ConfigError

KINDS = {
    "full": [
        "MODEL.VISFT.TUNE",
        "full",
        "MODEL.CLIP_VIT.LAYER_DECAY",
        "0.8",
        "MODEL.CLIP_VIT.PRETRAINED",
        "demo",
    ],
    "one stage": ["MODEL.VISFT.FREEZE_HEADS", "False"],
}


def arguments(kind: str, train, output) -> list[str]:
    export = "('open_clip',)" if kind == "full" else "()"
    return [
        *tiny_arguments(train, None, output),
        *KINDS[kind],
        *("VISFT.STAGES", "('lora',)", "VISFT.EXPORT", export),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def whole(request, shapes_train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    status, log = processes.run(
        "train_net.py", arguments(request.param, shapes_train, folder), folder / "log"
    )
    assert status == 0, log
    return request.param, folder, log


def end(folder) -> dict[str, torch.Tensor]:
    """What was trained, and the optimizer's moments."""
    model = load_file(folder / "lora" / "model_0000004.safetensors")
    trainer = load_file(folder / "lora" / "trainer_0000004.safetensors")
    return model | {f"trainer/{n}": t for n, t in trainer.items() if t.is_floating_point()}


def test_checkpoints_hold_what_trained(whole):
    kind, folder, log = whole
    names = set(load_file(folder / "lora" / "model_0000004.safetensors"))
    about = json.loads((folder / "lora" / "model_0000004.json").read_text())["settings"]
    if kind == "full":
        assert all(name.startswith("backbone.tower.") for name in names) and len(names) > 90
        assert about["tune"] == "full" and "lora" not in about
        assert 0 < log.find("stage lora will go through fresh heads") < log.find("stage lora: iterations 0")
    else:
        assert {name.split(".")[1] for name in names if name.startswith("heads.")} == {
            "detection",
            "segmentation",
        }
        assert any("lora_A" in name for name in names) and about["lora"]["rank"] == 2
        assert "through fresh heads" not in log


def test_a_killed_run_goes_on_to_the_bit(whole, shapes_train, tmp_path):
    kind, folder, _ = whole
    words = arguments(kind, shapes_train, tmp_path / "run")
    process = processes.start("train_net.py", words, tmp_path / "log")
    while process.is_alive() and not (tmp_path / "run/lora/model_0000002.json").is_file():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode < 0, "it ended before it was killed"
    status, log = processes.run("train_net.py", [*words[:2], "--resume", *words[2:]], tmp_path / "log")
    assert status == 0 and "resumed stage `lora` after iteration 2" in log, log
    found, expected = end(tmp_path / "run"), end(folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("whole", ["one stage"], indirect=True)  # fresh frozen heads are in no checkpoint
def test_the_run_can_be_evaluated(whole, shapes_train, shapes_test, tmp_path):
    kind, folder, _ = whole
    words = tiny_arguments(shapes_train, shapes_test, tmp_path / "e") + [
        *KINDS[kind],
        "VISFT.STAGES",
        "('lora',)",
    ]
    words = [*words[:2], "--eval-only", *words[2:], "MODEL.WEIGHTS", str(folder)]
    status, log = processes.run("train_net.py", words, tmp_path / "log")
    assert status == 0, log
    assert "segmentation/segm/AP50" in json.loads((tmp_path / "e" / "evaluation.json").read_text())


@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_the_export_has_the_tuned_weights(whole):
    _, folder, _ = whole
    base = open_clip.create_model("visft-tiny", pretrained="demo").eval()
    exported = open_clip.create_model(
        "visft-tiny", pretrained=str(folder / "export/visft_backbone.safetensors")
    ).eval()
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before, found = base.encode_image(images), exported.encode_image(images)
        # By hand: the checkpoint's tensors in the place of the base's.
        tuned = load_file(folder / "lora" / "model_0000004.safetensors")
        state = {n.removeprefix("backbone.tower."): t for n, t in tuned.items()}
        assert base.visual.load_state_dict(state, strict=False).unexpected_keys == []
        expected = base.encode_image(images)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - before).norm() > 1e-3 * before.norm()
    texts = open_clip.get_tokenizer("visft-tiny")(["a dog"])
    assert torch.equal(base.encode_text(texts), exported.encode_text(texts))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("MODEL.VISFT.TUNE", "fulll"), ("MODEL.VISFT.TUNE", "`full`")),
        (("MODEL.VISFT.TUNE", "full", "MODEL.CLIP_VIT.FROZEN_DTYPE", "bfloat16"), ("FROZEN_DTYPE", "bfloat16")),
        (("MODEL.VISFT.TUNE", "full", "MODEL.CLIP_VIT.TRAIN", "lora"), ("MODEL.CLIP_VIT.TRAIN",)),
        (("MODEL.VISFT.TUNE", "full", "VISFT.EXPORT", "('peft',)"), ("VISFT.EXPORT", "peft", "TUNE")),
        (("MODEL.VISFT.FREEZE_HEADS", "False", "VISFT.SOLVER.LORA.BASE_LR", "0.0"), ("BASE_LR", "FREEZE_HEADS")),
        (("MODEL.VISFT.FREEZE_HEADS", "no"), ("MODEL.VISFT.FREEZE_HEADS", "bool")),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(tiny, options, words):
    refused([*tiny, *options], ConfigError, *words)
