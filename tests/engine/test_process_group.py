"""What several processes share: draws, patience, and the end of a run. Real processes over gloo."""

import time
from pathlib import Path

import processes
import torch
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
    torch.multiprocessing.spawn(_draw, args=(str(tmp_path),), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for (mask, number), (other_mask, other_number) in zip(first, second, strict=True):
        assert not mask.equal(other_mask)
        assert number.equal(other_number)
    for found in (first, second):
        assert not found[0][0].equal(found[1][0]) and not found[0][1].equal(found[1][1])
        assert found[1][0].equal(found[2][0]) and found[1][1].equal(
            found[2][1]
        )  # the iteration alone decides


def _wait(rank: int, folder: str) -> None:
    Path(folder, f"here{rank}").touch()  # so that nobody waits for the other's imports
    while len(list(Path(folder).glob("here*"))) < WORLD:
        time.sleep(0.01)
    join_group("gloo", f"file://{folder}/store", rank, WORLD, 15 / 60)
    torch.distributed.barrier()
    if rank == 1:
        time.sleep(300)
        return
    start = time.monotonic()
    try:
        torch.distributed.barrier()
    except RuntimeError:
        Path(folder, "waited").write_text(str(time.monotonic() - start))


def test_processes_wait_as_long_as_they_are_told(tmp_path):
    context = torch.multiprocessing.spawn(_wait, args=(str(tmp_path),), nprocs=WORLD, join=False)
    context.processes[0].join(200)
    context.processes[1].kill()
    context.processes[1].join()
    assert 14.9 < float((tmp_path / "waited").read_text()) < 100


def test_the_main_process_exports_and_reports_alone(shapes_train, shapes_test, tmp_path):
    run = tmp_path / "run"
    words = tiny_arguments(shapes_train, shapes_test, run)
    words += [
        "VISFT.STAGES",
        "('heads',)",
        "VISFT.SOLVER.HEADS.MAX_ITER",
        "1",
        "VISFT.EXPORT",
        "('open_clip',)",
    ]
    first, second = processes.start_group("train_net.py", words, tmp_path / "log", WORLD)
    while first.is_alive() and not (run / "report.json").is_file():
        time.sleep(0.005)
    # The export is reopened in a fresh process, which takes seconds: time enough for the other to go.
    assert second.exitcode == 0
    first.join(60)
    assert first.exitcode == 0, (tmp_path / "log.0").read_text()
