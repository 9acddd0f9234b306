"""Sweeps: what is done, what is not done again, what a kill and a failure leave, and what a bad file is told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import yaml
from tiny_run import DEMO, tiny_arguments

from visft.applications import sweep, sweep_job
from visft.data.datasets import demo_world
from visft.engine import run_lock
from visft.errors import ConfigError, TrainingError

# So high a learning rate that the loss is no number at the second iteration.
BROKEN = {"VISFT.SOLVER.LORA.BASE_LR": 1e30, "VISFT.SOLVER.LORA.WARMUP_ITERS": 0}


@pytest.fixture(scope="session")
def content(shapes_train, shapes_test, tmp_path_factory) -> dict:
    """A sweep of seconds: stage 1 of two iterations shared by two runs of two."""
    words = tiny_arguments(shapes_train, shapes_test, tmp_path_factory.mktemp("unused"))[2:]
    settings = dict(zip(words[::2], words[1::2], strict=True))
    del settings["OUTPUT_DIR"]
    for stage in ("HEADS", "LORA"):
        settings[f"VISFT.SOLVER.{stage}.MAX_ITER"] = 2
        settings[f"VISFT.SOLVER.{stage}.CHECKPOINT_PERIOD"] = 1
    # Large enough to see in the weights after two steps.
    settings["VISFT.SOLVER.LORA.BASE_LR"] = 0.1
    return {
        "config": DEMO,
        "settings": settings,
        "runs": {"boxes": {"MODEL.VISFT.HEADS": ["detection"]}, "broken": BROKEN, "both": {}},
        "interpolate": [0.5, 1],
    }


def write(folder: Path, content: dict) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def plan(folder: Path, content: dict) -> list[sweep.Run]:
    return sweep.plan(sweep.read(write(folder, content)), folder)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def jobs(folder: Path) -> dict[str, float]:
    """When each job's log was last written to."""
    return {str(log.parent): log.stat().st_mtime_ns for log in folder.rglob("process.log")}


class Forked:
    """`subprocess.Popen` of a job, forked from a process that has imported everything."""

    def __init__(self, command: list[str], **streams) -> None:
        self._process = processes.begin(_job, command[-1], streams["stdout"].name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._process.join()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _job(folder: str, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    read_end, _ = os.pipe()  # the other one is open as long as this process lives
    sys.stdin = os.fdopen(read_end)
    sys.exit(sweep_job.main(folder))


def test_kill_failure_and_repetition(content, tmp_path, monkeypatch):
    file, out = write(tmp_path, content), tmp_path / "out"
    command = ["--config", str(file), "--output", str(out)]
    process = processes.start("sweep.py", command, tmp_path / "log")
    while process.is_alive() and not list(out.glob("runs/boxes*/job.json")):
        time.sleep(0.02)
    process.kill()
    process.join()
    heads = next(out.glob("heads/*/heads/model_0000002.safetensors"))
    trained = heads.stat().st_mtime_ns
    # The job's process ends with its sweep: nothing goes on writing there.
    running = next(out.glob("runs/boxes*"))
    deadline = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", str(running)], capture_output=True).stdout:
        assert time.monotonic() < deadline, "the killed sweep's job goes on"
        time.sleep(0.1)
    assert not (running / "finished.json").exists()

    # One of the runs fails, and does not stop the others.
    monkeypatch.setattr(sweep_job, "subprocess", SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE))
    with pytest.raises(TrainingError, match="1 of 3 runs failed, first `broken`"):
        sweep.run(file, out)
    found = results(out)
    assert [run["status"] for run in found["runs"]] == ["finished", "failed", "finished"]
    broken = found["runs"].pop(1)
    assert "the loss" in broken["error"] and "is nan" in broken["error"] and not broken["figures"]
    assert "broken, seed 1 failed" in (out / "table.md").read_text()
    assert heads.stat().st_mtime_ns == trained and len(list(out.glob("heads/*"))) == 1
    # Both runs are measured by both heads, the one that was trained through one of them too.
    assert found["measure"] == ["detection/bbox/AP50", "segmentation/segm/AP50"]
    for run in found["runs"]:
        assert run["figures"].keys() == {"0.5", "1"}
        for figures in (run["untuned"], *run["figures"].values()):
            assert all(0 <= figures[name] <= 100 for name in found["measure"])
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert "| both, interpolated 0.5 |" in (out / "table.md").read_text()

    # The boxes run's LoRA learned through the detection head alone.
    configs = {run["name"]: (out / run["folder"] / "config.yaml").read_text() for run in found["runs"]}
    heads_of = {name: yaml.safe_load(text)["MODEL"]["VISFT"]["HEADS"] for name, text in configs.items()}
    assert heads_of == {"boxes": ["detection"], "both": ["detection", "segmentation"]}

    # Renamed and reordered: nothing is run.
    before = jobs(out)
    sweep.run(
        write(tmp_path, {**content, "runs": {"both tasks": {}, "boxes": content["runs"]["boxes"]}}), out
    )
    assert jobs(out) == before
    assert [run["status"] for run in results(out)["runs"]] == ["finished"] * 2


def test_stage_1_is_shared_where_its_settings_are_equal(content, tmp_path):
    runs = {
        "rank 1": {"MODEL.LORA.RANK": 1},
        "boxes": {"MODEL.VISFT.HEADS": ["detection"]},
        "more queries": {"MODEL.VISFT.DETECTION.NUM_QUERIES": 6},
    }
    found = plan(tmp_path, {**content, "runs": runs, "seeds": [1, 2]})
    stage1 = {(run.name, run.seed): run.job.after for run in found}
    assert len({run.job.folder for run in found}) == 6
    assert len({run.heads[0].folder for run in found}) == 4  # two seeds of two kinds
    for seed in (1, 2):
        assert stage1["rank 1", seed] == stage1["boxes", seed] != stage1["more queries", seed]


def test_another_weight_file_or_data_set_is_another_run(content, tmp_path, shapes_test):
    def identity(**settings) -> str:
        changed = {**content, "settings": {**content["settings"], **settings}, "runs": {"run": {}}}
        return plan(tmp_path, changed)[0].job.folder

    plain = identity()
    assert identity() == plain and identity(**{"DATALOADER.NUM_WORKERS": 1}) == plain
    copied = tmp_path / "copied.json"
    copied.write_bytes(Path(content["settings"]["VISFT.DATA.TRAIN_JSON"]).read_bytes())
    same_place = identity(**{"VISFT.DATA.TRAIN_JSON": str(copied)})
    data = json.loads(copied.read_text())
    data["annotations"][0]["bbox"][2] += 1
    copied.write_text(json.dumps(data))
    assert identity(**{"VISFT.DATA.TRAIN_JSON": str(copied)}) != same_place


def test_grid_is_the_product_with_runs(content, tmp_path):
    grid = {"MODEL.LORA.RANK": [1, 2], "MODEL.LORA.TARGETS": [["q", "v"], ["q"]]}
    variants = sweep.read(write(tmp_path, {**content, "runs": {"all": {}}, "grid": grid})).variants
    assert list(variants) == [f"all, rank {r}, targets {t}" for r in (1, 2) for t in ("q+v", "q")]
    assert variants["all, rank 2, targets q"] == {"MODEL.LORA.RANK": 2, "MODEL.LORA.TARGETS": ["q"]}


def test_shipped_head_files_are_narrowed_to_a_runs_heads(tmp_path):
    content = {
        "config": "visft_demo",
        "demo_world": {"train": 2, "val": 2},
        "settings": {"VISFT.STAGES": ["lora"]},
        "runs": {"masks": {"MODEL.VISFT.HEADS": ["segmentation"]}},
        "seeds": [1, 2],
    }
    demo_world.make(tmp_path / "data", num_train=2, num_val=2)
    demo_world.register(tmp_path / "data")
    read = sweep.read(write(tmp_path, content))
    try:
        runs = sweep.plan(read, tmp_path)
    finally:
        demo_world.register()
    assert not runs[0].heads
    assert runs[0].untuned == runs[1].untuned  # no random number in it: one for all seeds
    files = runs[0].job.train["MODEL.VISFT.HEAD_FILES"]
    assert files and not any("detection" in file for file in files)
    assert read.measure[-1] == "zero_shot/top1" and len(read.measure) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {}}, "entry: `run` is unknown; the nearest is `runs`"),
        ({"config": "nowhere.yaml"}, "no config `nowhere.yaml`; it has"),
        ({"config": None}, "`config` does not have the form .*'None'"),
        ({"runs": {}}, "names no runs"),
        ({"runs": ["boxes"]}, "`runs` does not have the form"),
        (
            {"runs": {"a": {"MODEL.LORA.RNK": 4}}},
            "run `a`: key: `MODEL.LORA.RNK` is unknown.*MODEL.LORA.RANK",
        ),
        ({"runs": {"a": {"MODEL.LORA.RANK": "x"}}}, "run `a`: MODEL.LORA.RANK is 'x'"),
        ({"runs": {"a": {"MODEL.LORA.RANK": 0}}}, "run `a`: MODEL.LORA.RANK is 0"),
        ({"runs": {"a": {"SEED": 3}}}, "SEED is set by the sweep"),
        ({"runs": {"a": {"VISFT.STAGES": ["heads"]}}}, "a sweep is of stage lora"),
        ({"runs": {"a": {}, "b": {"MODEL.LORA.RANK": 2}}}, "run `b`: its settings are those of run `a`"),
        ({"runs": {"a": {"MODEL.VISFT.HEADS": ["detection", "detections"]}}}, "detections"),
        ({"grid": {"MODEL.LORA.RANK": 4}}, "`grid.MODEL.LORA.RANK` does not have the form .*Value 4"),
        (
            {"seeds": ["x"]},
            "`seeds.0.` does not have the form .*Value 'x' of type 'str' could not be converted to Int",
        ),
        ({"interpolate": [0]}, r"`interpolate` is \[0.0\]"),
        ({"measure": ["detection/bbox/AP50", "caption/CIDEr"]}, "`measure`: `caption/CIDEr` is unknown"),
        ({"demo_world": {"test": 4}}, "`demo_world.test` does not have the form"),
    ],
)
def test_bad_file_is_one_sentence_before_any_work(content, tmp_path, change, message):
    file = write(tmp_path, {**content, **change})
    with pytest.raises(ConfigError, match=message) as caught:
        sweep.run(file, tmp_path / "out")
    assert not list(tmp_path.glob("out/*/"))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("config: [", "not valid YAML at line 1"),
        ("config: !!python/object/apply:os.getcwd []", "only plain YAML is read"),
    ],
)
def test_missing_or_broken_file(tmp_path, text, message):
    file = tmp_path / "sweep.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        sweep.read(file)


def _hold(folder: Path, held: Path) -> None:
    with run_lock.locked(folder):
        held.touch()
        time.sleep(300)


def test_two_sweeps_in_one_folder(content, tmp_path):
    other = processes.begin(_hold, tmp_path / "out", tmp_path / "held")
    while other.is_alive() and not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(TrainingError, match=f"--output .*out: another run .*process {other.pid} "):
        sweep.run(write(tmp_path, content), tmp_path / "out")
    other.kill()
    other.join()


def test_table_and_differences_by_hand(tmp_path):
    def run(name, seed, before, after):
        row = {"name": name, "seed": seed, "status": "finished", "error": None, "seconds": 10.0 * seed}
        return {**row, "untuned": {"a/b": before}, "figures": {"1": {"a/b": after}} if after else {}}

    rows = [run("x", 1, 10.0, 12.0), run("x", 2, 11.0, 15.0), run("y", 1, 10.0, 9.0), run("y", 2, 11.0, None)]
    content = {"measure": ["a/b"], "interpolate": [1.0], "runs": rows}
    assert sweep.differences(content, "x", "1", "a/b") == [2.0, 4.0]
    table = sweep.table(content)
    assert "| the untuned tower | 10.50 | |" in table
    assert "| x | +3.00 ± 1.41 | 15 |" in table
    assert "| y | -1.00 | 15 |" in table
    sweep.write(content, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["results.json", "sweep.png", "table.md"]


@pytest.mark.parametrize(
    "file", sorted((Path(DEMO).parent / "sweeps").glob("*.yaml")), ids=lambda file: file.stem
)
def test_shipped_sweeps_are_well_formed(file):
    sweep.read(file)
