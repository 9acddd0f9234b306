"""Whole runs with objectives of the tower: without heads, killed and resumed; beside heads that take turns; refused."""

import json
import time

import processes
import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import refused
from tiny_run import tiny_arguments

from visft.errors import ConfigError, DataError

EVERY = "('anchor', 'contrastive', 'self_distillation')"
LORA = ["VISFT.STAGES", "('lora',)"]
ALONE = [*LORA, "MODEL.VISFT.HEADS", "()", "MODEL.VISFT.OBJECTIVES", EVERY]


@pytest.fixture(scope="module")
def captions(shapes_train, tmp_path_factory) -> list[str]:
    """Captions of all images to train on but one, two of them equal."""
    images = json.loads(shapes_train[0].read_text())["images"]
    texts = [f"picture number {max(i, 2)}" for i in range(len(images) - 1)]
    rows = [{"id": i, "image_id": images[i]["id"], "caption": text} for i, text in enumerate(texts)]
    file = tmp_path_factory.mktemp("captions") / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": rows}))
    return ["VISFT.DATA.TRAIN_CAPTIONS", str(file)]


def end(folder) -> dict[str, torch.Tensor]:
    """What was trained, and the optimizer's moments."""
    model = load_file(folder / "lora" / "model_0000004.safetensors")
    trainer = load_file(folder / "lora" / "trainer_0000004.safetensors")
    return model | {f"trainer/{n}": t for n, t in trainer.items() if t.is_floating_point()}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "lora" / "metrics.json").read_text().splitlines()]


def test_a_killed_run_without_heads_goes_on_to_the_bit(shapes_train, shapes_test, captions, tmp_path):
    folders, extra = [tmp_path / "whole", tmp_path / "killed"], [*ALONE, *captions]
    words = [[*tiny_arguments(shapes_train, shapes_test, folder), *extra] for folder in folders]
    status, log = processes.run("train_net.py", words[0], tmp_path / "log")
    assert status == 0 and "fresh heads" not in log, log
    process = processes.start("train_net.py", words[1], tmp_path / "log")
    while process.is_alive() and not (folders[1] / "lora/model_0000002.json").is_file():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode < 0, "it ended before it was killed"
    status, log = processes.run(
        "train_net.py", [*words[1][:2], "--resume", *words[1][2:]], tmp_path / "again"
    )
    assert status == 0 and "resumed stage `lora` after iteration 2" in log, log
    expected, found = (end(folder) for folder in folders)
    assert found.keys() == expected.keys() and all("lora_" in n or n.startswith("trainer/") for n in expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    names = {name for name in rows(folders[0])[-1] if name.endswith("/loss")}
    assert names == {"anchor/loss", "contrastive/loss", "self_distillation/loss"}


def test_beside_heads_that_take_turns(shapes_train, captions, tmp_path):
    """The objectives see the images of every task; the heads of the other task do not."""
    arguments = [*tiny_arguments(shapes_train, None, tmp_path / "run"), *LORA, *captions]
    arguments += ["MODEL.VISFT.OBJECTIVES", EVERY, "VISFT.TASK_MIXING", "ratio", "MODEL.VISFT.TUNE", "full"]
    status, log = processes.run("train_net.py", arguments, tmp_path / "log")
    assert status == 0, log
    assert 0 < log.find("stage lora will go through fresh heads") < log.find("stage lora: iterations 0")
    names = {name for row in rows(tmp_path / "run") for name in row}
    assert {"anchor/loss", "contrastive/loss", "self_distillation/loss"} <= names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MODEL.VISFT.OBJECTIVES", "('anchr',)"], ("MODEL.VISFT.OBJECTIVES", "`anchor`")),
        (["MODEL.VISFT.OBJECTIVES", "('anchor', 'anchor')"], ("twice",)),
        (["MODEL.VISFT.HEADS", "('anchor',)"], ("MODEL.VISFT.HEADS", "anchor", "detection")),
        (["MODEL.VISFT.OBJECTIVES", "('anchor',)", "MODEL.VISFT.ANCHOR.OBJECTIVE", "Ancho"], ("`Anchor`",)),
        (["MODEL.VISFT.OBJECTIVES", "('anchor',)", "MODEL.VISFT.ANCHOR.WEIGHT", "0.0"], ("ANCHOR.WEIGHT",)),
        (
            ["MODEL.VISFT.OBJECTIVES", "('anchor',)", "MODEL.VISFT.ANCHOR.SIZE", "60"],
            ("ANCHOR.SIZE", "8 pixels"),
        ),
        ([*ALONE, "MODEL.VISFT.SELF_DISTILLATION.REGIONS", "gird"], ("REGIONS", "`grid`")),
        ([*ALONE, "MODEL.VISFT.SELF_DISTILLATION.GRID", "0"], ("SELF_DISTILLATION.GRID",)),
        ([*ALONE, "MODEL.VISFT.SELF_DISTILLATION.MAX_REGIONS", "-1"], ("MAX_REGIONS",)),
        ([*ALONE, "VISFT.STAGES", "('heads', 'lora')"], ("VISFT.STAGES", "MODEL.VISFT.HEADS is empty")),
        ([*ALONE, "VISFT.TASK_MIXING", "ratio"], ("VISFT.TASK_MIXING", "joint")),
        ([*ALONE, "MODEL.VISFT.BALANCE_GRADIENTS", "True"], ("BALANCE_GRADIENTS",)),
        ([*ALONE, "MODEL.VISFT.FREEZE_HEADS", "False"], ("FREEZE_HEADS",)),
        ([*ALONE, "MODEL.VISFT.HEAD_FILES", "('/nowhere',)"], ("HEAD_FILES", "()")),
        ([*LORA, "MODEL.VISFT.HEADS", "()"], ("MODEL.VISFT.HEADS is empty",)),
    ],
    ids=lambda value: None,
)
def test_what_is_wrong_is_refused(tiny, options, words):
    refused([*tiny, *options], ConfigError, *words)


def test_contrastive_without_captions_is_refused(tiny):
    refused([*tiny, *ALONE], DataError, "contrastive", "VISFT.DATA.TRAIN_CAPTIONS")


def test_boxes_that_are_not_there_are_refused_before_training(shapes_train, captions, tmp_path):
    """Pictures with captions alone."""
    arguments = [*tiny_arguments(shapes_train, None, tmp_path / "run"), *ALONE, *captions]
    arguments += ["VISFT.DATA.TRAIN_JSON", "", "MODEL.VISFT.SELF_DISTILLATION.REGIONS", "boxes"]
    status, log = processes.run("train_net.py", arguments, tmp_path / "log")
    assert status == 1 and "the objective `self_distillation` can learn from none of its" in log, log
    assert not (tmp_path / "run" / "lora").exists()


@pytest.mark.parametrize("tool", ["benchmark.py", "predict.py"])
def test_what_needs_heads_says_so(tool, tiny, tmp_path):
    own = ["--input", "/nowhere.jpg", "--output", str(tmp_path / "drawn")] if tool == "predict.py" else []
    status, log = processes.run(tool, [*tiny[:2], *own, *tiny[2:], *ALONE], tmp_path / "log")
    assert status == 1 and "MODEL.VISFT.HEADS is empty" in log and "Traceback" not in log, log
