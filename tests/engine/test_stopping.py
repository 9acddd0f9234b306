"""A run that is asked to stop saves the iteration it is in, and goes on to the bits of one that was left alone."""

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import runs
from tiny_run import tiny_arguments

END = 30


def _arguments(train: tuple[Path, Path], run: Path, *, resume: bool = False, period: int = 0) -> list[str]:
    keys = {"VISFT.STAGES": "('heads',)", "VISFT.SOLVER.HEADS.MAX_ITER": END}
    keys |= {"VISFT.SOLVER.HEADS.CHECKPOINT_PERIOD": period, "DATALOADER.NUM_WORKERS": 1}
    keys |= {"MODEL.VISFT.HEADS": "('detection',)"}
    words = [*tiny_arguments(train, None, run), *runs.words(keys)]
    return runs.option(words, "--resume") if resume else words


def _start(arguments: list[str], log: Path, count: int) -> list[multiprocessing.Process]:
    return processes.start_group("train_net.py", arguments, log, count)


def _end(started: list[multiprocessing.Process]) -> list[int]:
    for process in started:
        process.join(300)
    return [process.exitcode for process in started]


def _wait_for_text(file: Path, text: str, started: list[multiprocessing.Process]) -> None:
    while all(process.is_alive() for process in started):
        if file.is_file() and text in file.read_text():
            return
        time.sleep(0.002)


def _wait_for_training(run: Path, started: list[multiprocessing.Process]) -> None:
    """Until iteration 20 is written."""
    _wait_for_text(run / "heads" / "metrics.json", "}", started)


@pytest.fixture(scope="module")
def whole(shapes_train, tmp_path_factory) -> Callable[[int], dict]:
    """The end of a run of so many processes that is left alone."""

    @functools.cache
    def state(count: int) -> dict:
        folder = tmp_path_factory.mktemp("whole")
        started = _start(_arguments(shapes_train, folder / "run"), folder / "log", count)
        assert _end(started) == [0] * count, [file.read_text() for file in folder.glob("log*")]
        return runs.end(folder / "run", "heads")

    return state


@pytest.mark.parametrize(
    ("count", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)], ids=str
)
def test_goes_on_to_the_same_bits(count, number, shapes_train, whole, tmp_path):
    """The signal goes to every process, loaders' workers included, as Slurm sends it."""
    run = tmp_path / "run"
    killed = number == signal.SIGKILL
    started = _start(_arguments(shapes_train, run, period=15 * killed), tmp_path / "first", count)
    _wait_for_training(run, started)
    for pid in [pid for p in started for pid in (p.pid, *processes.descendants(p.pid))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    text = "".join(file.read_text() for file in tmp_path.glob("first*"))
    assert _end(started) == [-number if killed else 128 + number] * count, text
    done = int(max((run / "heads").glob("model_*.json")).stem.removeprefix("model_"))
    assert 0 < done < END
    if not killed:
        log = (run / "log.txt").read_text()
        assert log.count(f"{number.name}: stage heads stops after iteration {done} of {END}") == 1
        assert "Traceback" not in text and "error" not in text

    assert set(_end(_start(_arguments(shapes_train, run, resume=True), tmp_path / "second", count))) == {0}
    assert f"resumed stage `heads` after iteration {done}" in (run / "log.txt").read_text()
    runs.assert_same_end(runs.end(run, "heads"), whole(count))


def test_the_process_that_started_the_others_hands_it_on(shapes_train, tmp_path):
    words = _arguments(shapes_train, tmp_path / "run")
    words, log = runs.option(words, "--num-gpus", "2"), tmp_path / "log"
    process = processes.start("train_net.py", words, log, before=processes.fork_group)
    _wait_for_training(tmp_path / "run", [process])
    os.kill(process.pid, signal.SIGUSR1)
    assert _end([process]) == [128 + signal.SIGUSR1], (tmp_path / "log").read_text()
    assert "SIGUSR1: stage heads stops after iteration" in (tmp_path / "run" / "log.txt").read_text()
    assert len(list((tmp_path / "run" / "heads").glob("model_*.json"))) == 1


def test_outside_of_iterations_the_run_ends_at_once(shapes_train, shapes_test, tmp_path):
    """During the evaluation that ends a stage, when everything is saved."""
    run = tmp_path / "run"
    words = tiny_arguments(shapes_train, shapes_test, run)
    words += ["VISFT.STAGES", "('heads',)", "VISFT.SOLVER.HEADS.MAX_ITER", "1"]
    process = processes.start("train_net.py", words, tmp_path / "log")
    _wait_for_text(run / "log.txt", "Start inference on", [process])
    os.kill(process.pid, signal.SIGTERM)
    assert _end([process]) == [143], (tmp_path / "log").read_text()
    assert "SIGTERM: the run stops" in (run / "log.txt").read_text()
    assert not (run / "report.md").exists()
    runs.train(runs.option(words, "--resume"), tmp_path / "again")
    assert (run / "report.md").is_file()
