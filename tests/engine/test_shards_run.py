"""Training on captions in shards: a killed run ends with the bits of one that nobody killed."""

import pytest
import runs
import webdataset_shards
from captioned_shapes import SMALL
from safetensors.torch import load_file
from tiny_run import tiny_arguments

STAGES = ("heads", "lora")


@pytest.fixture(scope="module")
def arguments(shapes_train, tmp_path_factory):
    """Boxes from JSON; captions from shards, for a caption head and the objective `contrastive`."""
    shards = webdataset_shards.make(tmp_path_factory.mktemp("shards"), images=9, shards=3)
    keys = SMALL | {
        "MODEL.VISFT.OBJECTIVES": "('contrastive',)",
        "MODEL.CLIP_VIT.PRETRAINED": "demo",
        "VISFT.DATA.TRAIN_SHARDS": f"{shards}/{{00000..00002}}.tar",
        "DATALOADER.NUM_WORKERS": 1,
    }
    return lambda output: [*tiny_arguments(shapes_train, None, output), *runs.words(keys)]


def test_a_killed_run_goes_on_to_the_bit(arguments, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.train(arguments(whole), tmp_path / "log")
    metrics = [row for stage in STAGES for row in runs.rows(whole / stage / "metrics.json")]
    assert {"captioning/loss_words", "contrastive/loss"} <= {key for row in metrics for key in row}
    assert any(
        tensor.any() for name, tensor in load_file(runs.newest(whole, "lora")).items() if "lora_B" in name
    )
    words = arguments(run)
    for stage in STAGES:
        runs.killed_when((run / stage / "last_checkpoint").is_file, words, tmp_path / f"{stage}.log")
        words = runs.option(arguments(run), "--resume")
    log = runs.train(words, tmp_path / "log")
    assert "resumed stage `lora` after iteration 2" in log
    runs.assert_same_end(runs.end(run, *STAGES), runs.end(whole, *STAGES))
