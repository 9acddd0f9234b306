"""Whole runs that mix their tasks by ratio: killed and resumed, in two processes; and what is refused beforehand."""

import json
import socket
import time

import processes
import pytest
import torch
from detectron2.engine import default_argument_parser
from safetensors.torch import load_file
from tiny_run import tiny_arguments

from visft.engine import launch
from visft.errors import ConfigError

RATIO = [
    *("VISFT.TASK_MIXING", "ratio"),
    *("VISFT.TASK_RATIOS", "(0.4, 0.6)"),
    *("VISFT.TASKS.DETECTION.IMS_PER_BATCH", "4"),
    *("VISFT.TASKS.SEGMENTATION.SIZE", "48"),
]


def arguments(train, output, *, iterations: int = 6) -> list[str]:
    found = tiny_arguments(train, None, output)
    for stage in ("HEADS", "LORA"):
        found += [f"VISFT.SOLVER.{stage}.MAX_ITER", str(iterations)]
        found += [f"VISFT.SOLVER.{stage}.CHECKPOINT_PERIOD", "2"]
    return [*found, *RATIO, "DATALOADER.NUM_WORKERS", "1"]


def end(folder) -> dict[str, torch.Tensor]:
    """All that a run has trained, its optimizers' moments included."""
    found = {}
    for stage in ("heads", "lora"):
        for kind in ("model", "trainer"):
            tensors = load_file(folder / stage / f"{kind}_0000006.safetensors")
            found |= {f"{stage}/{kind}/{name}": t for name, t in tensors.items() if t.is_floating_point()}
    return found


@pytest.fixture(scope="module")
def whole(shapes_train, tmp_path_factory):
    """A run that nobody kills: both stages, two batches an iteration in stage lora."""
    folder = tmp_path_factory.mktemp("mixing")
    command = [*arguments(shapes_train, folder / "run"), "VISFT.SOLVER.LORA.ACCUMULATE", "2"]
    status, log = processes.run("train_net.py", command, folder / "log")
    assert status == 0, log
    return folder / "run"


def test_each_head_trains(whole):
    """In stage heads too, each in the iterations that draw it: AdamW has its moments for every head."""
    moments = [
        name for name, t in end(whole).items() if name.startswith("heads/trainer") and t.abs().sum() > 0
    ]
    assert moments
    metrics = [json.loads(row) for row in (whole / "heads" / "metrics.json").read_text().splitlines()]
    names = {name for row in metrics for name in row}
    assert {"detection/loss_ce", "segmentation/loss_ce"} <= names


def test_a_killed_run_ends_with_the_same_bits(whole, shapes_train, tmp_path):
    command = [*arguments(shapes_train, tmp_path / "run"), "VISFT.SOLVER.LORA.ACCUMULATE", "2"]
    for stage in ("heads", "lora"):
        resume = ["--resume"] if stage == "lora" else []
        process = processes.start("train_net.py", [*command[:2], *resume, *command[2:]], tmp_path / "log")
        checkpoint = tmp_path / "run" / stage / "last_checkpoint"
        while process.is_alive() and not checkpoint.is_file():
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9, (tmp_path / "log").read_text()
    status, log = processes.run("train_net.py", [*command[:2], "--resume", *command[2:]], tmp_path / "log")
    assert status == 0, log
    found, expected = end(tmp_path / "run"), end(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not expected[name].equal(found[name])] == []


def test_two_processes_train_as_one_with_the_joined_batch(shapes_train, tmp_path):
    """Started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = {}
    for world in (1, 2):
        command = arguments(shapes_train, tmp_path / str(world))
        command += ["VISFT.STAGES", "('heads',)", "MODEL.VISFT.DETECTION.DROPOUT", "0.0"]
        for rank in range(world):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            where = {key: str(value) for key, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
            log = tmp_path / f"log{world}{rank}"
            runs[world, rank] = (processes.start("train_net.py", command, log, **where), log)
    for process, log in runs.values():
        process.join()
        assert process.exitcode == 0, log.read_text()
    one, two = (load_file(tmp_path / str(world) / "heads" / "model_0000006.safetensors") for world in (1, 2))
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-3, name  # six AdamW steps of 1e-3 or less


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("VISFT.TASK_MIXING", "ration", ("VISFT.TASK_MIXING", "ration", "`ratio`")),
        (
            "VISFT.TASK_RATIOS",
            "(1.0,)",
            ("VISFT.TASK_RATIOS", "1 numbers", "2 heads", "detection, segmentation"),
        ),
        ("VISFT.TASK_RATIOS", "(0.5, -0.5)", ("segmentation", "-0.5", "above 0")),
        ("VISFT.TASK_RATIOS", "(0.0, 1.0)", ("detection", "0.0", "MODEL.VISFT.HEADS")),
        ("VISFT.TASK_RATIOS", "(0, 0)", ("VISFT.TASK_RATIOS", "above 0")),
        ("VISFT.TASK_RATIOS", "(float('nan'), 1)", ("VISFT.TASK_RATIOS",)),
        ("VISFT.TASK_RATIOS", "('a', 1)", ("VISFT.TASK_RATIOS", "'a'")),
        ("VISFT.TASKS.DETECTION.AUGMENTATION", "lsjj", ("VISFT.TASKS.DETECTION.AUGMENTATION", "`lsj`")),
        ("VISFT.TASKS.DETECTION.IMS_PER_BATCH", "-1", ("VISFT.TASKS.DETECTION.IMS_PER_BATCH", "-1")),
        ("VISFT.TASKS.DETECTION.MIN_SIZE_TRAIN", "(0,)", ("VISFT.TASKS.DETECTION.MIN_SIZE_TRAIN",)),
        ("VISFT.TASKS.DETECTION.MIN_SIZE_TRAIN", "(64,)", ("MIN_SIZE_TRAIN", "`fixed`", "SIZE")),
        ("VISFT.TASKS.DETECTION.SIZ", "1", ("VISFT.TASKS.DETECTION.SIZE",)),
        ("MODEL.VISFT.BALANCE_GRADIENTS", "True", ("MODEL.VISFT.BALANCE_GRADIENTS", "joint")),
    ],
)
def test_what_is_refused_before_anything_is_built(shapes_train, tmp_path, key, value, words):
    command = [*arguments(shapes_train, tmp_path / "run"), key, value]
    with pytest.raises(ConfigError) as caught:
        launch.prepare(default_argument_parser().parse_args(command))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert not (tmp_path / "run").exists()


def test_a_task_that_processes_cannot_share(shapes_train, tmp_path):
    command = arguments(shapes_train, tmp_path / "run")
    command = [*command[:2], "--num-gpus", "2", *command[2:], "VISFT.TASKS.DETECTION.IMS_PER_BATCH", "3"]
    with pytest.raises(ConfigError, match="VISFT.TASKS.DETECTION.IMS_PER_BATCH is 3, which 2 processes"):
        launch.prepare(default_argument_parser().parse_args(command))


def test_ratios_are_checked_where_tasks_are_joint_too(shapes_train, tmp_path):
    command = [*tiny_arguments(shapes_train, None, tmp_path / "run"), "VISFT.TASK_RATIOS", "(1.0,)"]
    with pytest.raises(ConfigError, match="VISFT.TASK_RATIOS has 1 numbers"):
        launch.prepare(default_argument_parser().parse_args(command))


def test_data_without_labels_for_a_task_stop_the_run_before_it_begins(shapes_train, tmp_path):
    file = tmp_path / "boxes.json"
    content = json.loads(shapes_train[0].read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    file.write_text(json.dumps(content))
    command = arguments((file, shapes_train[1]), tmp_path / "run")
    status, log = processes.run("train_net.py", command, tmp_path / "log", VISFT_DEBUG="")
    assert status == 1 and "`segmentation`" in log and "Traceback" not in log
    assert not (tmp_path / "run" / "heads").exists()
