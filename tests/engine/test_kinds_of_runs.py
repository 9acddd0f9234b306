"""Whole runs through the text encoder as a head, and with objectives beside heads that take turns."""

import runs
from safetensors.torch import load_file
from tiny_run import tiny_arguments

TEXT = ["MODEL.VISFT.HEADS", "('region_text',)", "MODEL.CLIP_VIT.PRETRAINED", "demo"]


def test_the_text_encoder_alone_skips_stage_heads_and_trains_lora(shapes_train, tmp_path):
    run = tmp_path / "run"
    log = runs.train([*tiny_arguments(shapes_train, None, run), *TEXT], tmp_path / "log")
    assert "stage heads is skipped: region_text has no weights to train" in log
    assert "fresh heads" not in log and not (run / "heads").exists()
    trained = load_file(run / "lora" / "model_0000004.safetensors")
    assert trained and all("lora_" in name for name in trained)
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    assert all(row["region_text/loss_text"] > 0 for row in runs.rows(run / "lora" / "metrics.json"))


def test_beside_the_text_encoder_stage_heads_trains_the_detector_as_if_it_were_alone(shapes_train, tmp_path):
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    for folder, keys in (
        (alone, ["MODEL.VISFT.HEADS", "('detection',)", "VISFT.SOLVER.LORA.MAX_ITER", "1"]),
        (beside, ["MODEL.VISFT.HEADS", "('detection', 'region_text')"]),
    ):
        arguments = [*tiny_arguments(shapes_train, None, folder), *TEXT, *keys]
        runs.train(arguments, tmp_path / f"{folder.name}.log")
    runs.assert_same_end(runs.end(beside, "heads"), runs.end(alone, "heads"))
    names = {
        stage: {name for row in runs.rows(beside / stage / "metrics.json") for name in row}
        for stage in ("heads", "lora")
    }
    assert {"detection/loss_ce", "region_text/loss_text"} <= names["lora"]
    assert "region_text/loss_text" not in names["heads"]


def test_objectives_beside_heads_that_take_turns(shapes_train, shapes_captions, tmp_path):
    """The objectives see the images of every task; the heads of the other task do not."""
    keys = {
        "VISFT.STAGES": "('lora',)",
        "VISFT.DATA.TRAIN_CAPTIONS": shapes_captions,
        "MODEL.VISFT.OBJECTIVES": "('anchor', 'contrastive', 'self_distillation')",
        "VISFT.TASK_MIXING": "ratio",
        "MODEL.VISFT.TUNE": "full",
    }
    arguments = [*tiny_arguments(shapes_train, None, tmp_path / "run"), *runs.words(keys)]
    log = runs.train(arguments, tmp_path / "log")
    assert 0 < log.find("stage lora will go through fresh heads") < log.find("stage lora: iterations 0")
    names = {name for row in runs.rows(tmp_path / "run" / "lora" / "metrics.json") for name in row}
    assert {"anchor/loss", "contrastive/loss", "self_distillation/loss"} <= names
