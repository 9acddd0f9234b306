"""What several processes share: draws, patience, and the end of a run. Real processes over gloo."""

import time
from pathlib import Path

import processes
import pytest
import runs
import torch
from safetensors.torch import load_file
from tiny_run import tiny_arguments

from visft.engine.launch import join_group
from visft.engine.trainer import seeded_iteration
from visft.utils import shared_random

WORLD = 2


def _draw(rank: int, folder: str) -> None:
    join_group("gloo", f"file://{folder}/store", rank, WORLD, 1.0)
    found = []
    for iteration in (0, 1, 1):
        with seeded_iteration(3, "heads", iteration):
            mask = torch.nn.functional.dropout(torch.ones(64), 0.5)
            torch.rand(rank)  # what one process draws more than another
            found.append((mask, torch.tensor(shared_random.number())))
    torch.save(found, f"{folder}/{rank}.pt")


def test_dropout_is_each_processs_own_and_points_are_shared(tmp_path):
    processes.call(_draw, *((rank, str(tmp_path)) for rank in range(WORLD)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for (mask, number), (other_mask, other_number) in zip(first, second, strict=True):
        assert not mask.equal(other_mask)
        assert number.equal(other_number)
    for found in (first, second):
        assert not found[0][0].equal(found[1][0]) and not found[0][1].equal(found[1][1])
        # The iteration alone decides.
        assert found[1][0].equal(found[2][0]) and found[1][1].equal(found[2][1])


def _wait(rank: int, folder: str) -> None:
    Path(folder, f"here{rank}").touch()  # so that nobody waits for the other's imports
    while len(list(Path(folder).glob("here*"))) < WORLD:
        time.sleep(0.01)
    join_group("gloo", f"file://{folder}/store", rank, WORLD, 5 / 60)
    torch.distributed.barrier()
    if rank == 1:  # does not come to the second barrier
        while not Path(folder, "waited").exists():
            time.sleep(0.01)
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        torch.distributed.barrier()
    Path(folder, "waited").write_text(str(time.monotonic() - start))


def test_processes_wait_as_long_as_they_are_told(tmp_path):
    processes.call(_wait, *((rank, str(tmp_path)) for rank in range(WORLD)))
    assert 4.9 < float((tmp_path / "waited").read_text()) < 100


def test_the_main_process_exports_and_reports_alone(shapes_train, shapes_test, tmp_path):
    run = tmp_path / "run"
    keys = {"VISFT.STAGES": "('heads',)", "VISFT.SOLVER.HEADS.MAX_ITER": 1, "VISFT.EXPORT": "('open_clip',)"}
    arguments = [*tiny_arguments(shapes_train, shapes_test, run), *runs.words(keys)]
    first, second = processes.start_group("train_net.py", arguments, tmp_path / "log", WORLD)
    while first.is_alive() and not (run / "report.json").is_file():
        time.sleep(0.005)
    # The export is reopened in a fresh process, which takes seconds: time enough for the other to go.
    assert second.exitcode == 0
    first.join(60)
    assert first.exitcode == 0, (tmp_path / "log.0").read_text()


IN_TURN = {
    "VISFT.TASK_MIXING": "ratio",
    "VISFT.TASK_RATIOS": "(0.4, 0.6)",
    "VISFT.TASKS.DETECTION.IMS_PER_BATCH": 4,
    "VISFT.TASKS.SEGMENTATION.SIZE": 48,
    "VISFT.SOLVER.HEADS.MAX_ITER": 6,
    "DATALOADER.NUM_WORKERS": 1,
}


@pytest.mark.parametrize("keys", [{}, IN_TURN], ids=["joint, --num-gpus", "in turn, as torchrun"])
def test_two_processes_train_as_one_with_the_joined_batch(keys, shapes_train, tmp_path):
    keys = {"VISFT.SOLVER.HEADS.MAX_ITER": 4} | keys
    keys |= {"VISFT.STAGES": "('heads',)", "MODEL.VISFT.DETECTION.DROPOUT": 0.0}
    started = []
    for count in (1, WORLD):
        arguments = [*tiny_arguments(shapes_train, None, tmp_path / str(count)), *runs.words(keys)]
        log = tmp_path / f"log{count}"
        if IN_TURN.keys() <= keys.keys():
            started += processes.start_group("train_net.py", arguments, log, count)
        else:
            started.append(
                processes.start("train_net.py", runs.option(arguments, "--num-gpus", str(count)), log)
            )
    for process in started:
        process.join(300)
        assert process.exitcode == 0, [log.read_text() for log in tmp_path.glob("log*")]
    ends = [load_file(runs.newest(tmp_path / str(count), "heads")) for count in (1, WORLD)]
    # One process continues what two began.
    for file in (tmp_path / str(WORLD) / "heads").glob(f"*{keys['VISFT.SOLVER.HEADS.MAX_ITER']:07d}*"):
        file.unlink()
    text = runs.train(runs.option(arguments, "--resume"), tmp_path / "log")
    assert "was written by 2 processes, this run has 1" in text
    ends.append(load_file(runs.newest(tmp_path / str(WORLD), "heads")))
    for other in ends[1:]:
        for name, tensor in ends[0].items():
            assert (tensor - other[name]).abs().max() < 1e-3, name  # six AdamW steps of 1e-3 or less
