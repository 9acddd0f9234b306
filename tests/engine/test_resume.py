"""A killed run continues as if it had not been killed: a real process, a real SIGKILL, the same bits at the end."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import kill_runs
import processes
import pytest
from safetensors.torch import load_file
from tiny_run import tiny_arguments

STAGES = ("heads", "lora")
ITERATIONS = 5


def _arguments(train, output: Path) -> list[str]:
    arguments = tiny_arguments(train, None, output)
    for stage in ("HEADS", "LORA"):
        arguments += [f"VISFT.SOLVER.{stage}.MAX_ITER", str(ITERATIONS)]
        arguments += [f"VISFT.SOLVER.{stage}.CHECKPOINT_PERIOD", "2"]
        arguments += [f"VISFT.SOLVER.{stage}.ACCUMULATE", "2" if stage == "LORA" else "1"]
    return [*arguments, "DATALOADER.NUM_WORKERS", "1"]


def _end(folder: Path) -> dict:
    files = {stage: folder / stage / f"model_{ITERATIONS:07d}.safetensors" for stage in STAGES}
    weights = {f"{stage}/{name}": t for stage in STAGES for name, t in load_file(files[stage]).items()}
    # The optimizer's moments too: they say whether the same batches were seen in the same order.
    for stage in STAGES:
        trainer = load_file(folder / stage / f"trainer_{ITERATIONS:07d}.safetensors")
        weights |= {f"{stage}/trainer/{name}": t for name, t in trainer.items() if t.is_floating_point()}
    return weights


def _different(found: dict, expected: dict) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not expected[name].equal(found[name])]


@pytest.fixture(scope="module")
def uninterrupted(shapes_train, tmp_path_factory) -> tuple[dict, dict[str, float]]:
    """The end of a run that nobody kills, and how long its stages took."""
    folder = tmp_path_factory.mktemp("whole")
    process = processes.start("train_net.py", _arguments(shapes_train, folder / "run"), folder / "log")
    began: dict[str, float] = {}
    while process.is_alive():
        for stage in STAGES:
            if stage not in began and (folder / "run" / stage).is_dir():
                began[stage] = time.monotonic()
        time.sleep(0.01)
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    end = time.monotonic()
    return _end(folder / "run"), {"heads": began["lora"] - began["heads"], "lora": end - began["lora"]}


def _run_and_kill(train, folder: Path, durations: dict[str, float], rng: random.Random, kills: int) -> int:
    """Run with --resume until it ends, killing it `kills` times; returns how many kills struck."""
    log, struck = folder / "log", 0
    arguments = _arguments(train, folder / "run")
    for attempt in range(kills + 1):
        resume = ["--resume"] if attempt else []
        process = processes.start("train_net.py", [*arguments[:2], *resume, *arguments[2:]], log)
        if attempt < kills:
            stage = STAGES[attempt % 2] if attempt < kills - 1 else "lora"
            while process.is_alive() and not (folder / "run" / stage).is_dir():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, durations[stage]))
            if process.is_alive():
                process.kill()
        process.join()
        struck += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    assert process.exitcode == 0, log.read_text()
    return struck


def _check(train, folder: Path, uninterrupted, kills: int, seed: int) -> None:
    expected, durations = uninterrupted
    rng, struck = random.Random(seed), 0
    for attempt in range(5):
        (folder / str(attempt)).mkdir()
        struck = _run_and_kill(train, folder / str(attempt), durations, rng, kills)
        different = _different(_end(folder / str(attempt) / "run"), expected)
        assert different == [], f"seed {seed}, attempt {attempt}"
        if struck:
            break
        # Measured on a busy machine, the stages seemed longer than they are now.
        durations = {stage: seconds / 2 for stage, seconds in durations.items()}
    assert struck >= 1, "no kill struck while the run was alive"


def test_three_kills(shapes_train, uninterrupted, tmp_path):
    _check(shapes_train, tmp_path, uninterrupted, kills=3, seed=time.time_ns() % 1000)


@pytest.mark.slow
def test_twenty_kills_half_of_them_while_a_file_is_written(shapes_train, tmp_path):
    counts = kill_runs.kill_and_resume(shapes_train, tmp_path, kills=20, seed=time.time_ns() % 1000)
    assert counts["struck"] == 20 and counts["left_half_written"] >= 5 and counts["finished"]
    assert counts["broken"] == counts["different"] == 0, counts


def test_finished_stage_is_not_repeated_and_lora_starts_from_its_heads(shapes_train, uninterrupted, tmp_path):
    arguments = _arguments(shapes_train, tmp_path / "run")
    status, log = processes.run("train_net.py", arguments, tmp_path / "log")
    assert status == 0, log
    heads = tmp_path / "run" / "heads" / f"model_{ITERATIONS:07d}.safetensors"
    before = heads.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "run" / "lora")
    status, log = processes.run(
        "train_net.py", [*arguments[:2], "--resume", *arguments[2:]], tmp_path / "second"
    )
    assert status == 0, log
    assert heads.stat().st_mtime_ns == before
    # Stage lora, run alone from the heads on the disk, ends as it did in one go.
    assert _different(_end(tmp_path / "run"), uninterrupted[0]) == []
    assert "threads per process" not in log


def test_resuming_with_other_threads_says_what_it_costs(shapes_train, tmp_path):
    arguments = _arguments(shapes_train, tmp_path / "run") + ["VISFT.STAGES", "('heads',)"]
    arguments += ["VISFT.SOLVER.HEADS.MAX_ITER", "1"]
    status, text = processes.run("train_net.py", arguments, tmp_path / "log")
    assert status == 0, text
    state = tmp_path / "run" / "run.json"
    assert json.loads(state.read_text())["threads"] == 1
    state.write_text(state.read_text().replace('"threads": 1', '"threads": 3'))
    arguments = [*arguments[:2], "--resume", *arguments[2:]]
    status, text = processes.run("train_net.py", arguments, tmp_path / "again")
    assert status == 0, text
    assert "started with 3 threads per process and continues with 1" in text


def test_without_resume_an_earlier_run_is_kept_aside(shapes_train, tmp_path):
    arguments = _arguments(shapes_train, tmp_path / "run")
    arguments += ["VISFT.STAGES", "('heads',)", "VISFT.SOLVER.HEADS.MAX_ITER", "2"]
    for log in ("first", "second"):
        status, text = processes.run("train_net.py", arguments, tmp_path / log)
        assert status == 0, text
    assert (tmp_path / "run" / "earlier-1" / "heads" / "model_0000002.safetensors").is_file()
    assert (tmp_path / "run" / "heads" / "model_0000002.safetensors").is_file()
