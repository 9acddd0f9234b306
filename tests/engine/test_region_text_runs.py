"""Whole runs with the text encoder as a head: alone, beside a head with weights, and what is refused."""

import json

import processes
import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import refused
from tiny_run import tiny_arguments

from visft.errors import ConfigError

TEXT = "MODEL.VISFT.REGION_TEXT"


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_alone_stage_heads_is_skipped_and_lora_trains(shapes_train, tmp_path):
    arguments = tiny_arguments(shapes_train, None, tmp_path / "run")
    arguments += ["MODEL.VISFT.HEADS", "('region_text',)", "MODEL.CLIP_VIT.PRETRAINED", "demo"]
    status, log = processes.run("train_net.py", arguments, tmp_path / "log")
    assert status == 0, log
    assert "stage heads is skipped: region_text has no weights to train" in log
    assert "fresh heads" not in log and not (tmp_path / "run" / "heads").exists()
    trained = load_file(tmp_path / "run" / "lora" / "model_0000004.safetensors")
    assert trained and all("lora_" in name for name in trained)
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    losses = [row["region_text/loss_text"] for row in rows(tmp_path / "run/lora/metrics.json")]
    assert all(loss > 0 for loss in losses)


def test_beside_a_head_with_weights(shapes_train, tmp_path):
    """Stage heads trains the detector as if it were alone."""
    ends = {}
    for heads in ("('detection',)", "('detection', 'region_text')"):
        folder = tmp_path / str(len(heads))
        arguments = tiny_arguments(shapes_train, None, folder)
        arguments += ["MODEL.VISFT.HEADS", heads, "MODEL.CLIP_VIT.PRETRAINED", "demo"]
        status, log = processes.run("train_net.py", arguments, tmp_path / "log")
        assert status == 0, log
        ends[heads] = load_file(folder / "heads" / "model_0000004.safetensors")
    alone, beside = ends.values()
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    names = {name for row in rows(folder / "lora/metrics.json") for name in row}
    assert {"detection/loss_ce", "region_text/loss_text"} <= names
    assert "region_text/loss_text" not in {n for row in rows(folder / "heads/metrics.json") for n in row}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([f"{TEXT}.PROMPTS", "('a photo',)"], (f"{TEXT}.PROMPTS has `a photo`", "each with one")),
        ([f"{TEXT}.PROMPTS", "()"], (f"{TEXT}.PROMPTS is empty",)),
        ([f"{TEXT}.REGIONS", "mask"], (f"{TEXT}.REGIONS", "`masks`")),
        ([f"{TEXT}.LOSS", "sigmoit"], (f"{TEXT}.LOSS", "`sigmoid`")),
        ([f"{TEXT}.FED_LOSS_CLASSES", "2"], (f"{TEXT}.FED_LOSS_CLASSES", "class_image_count")),
    ],
    ids=lambda value: None,
)
def test_what_is_wrong_is_refused(tiny, options, words):
    refused([*tiny, "MODEL.VISFT.HEADS", "('region_text',)", *options], ConfigError, *words)
