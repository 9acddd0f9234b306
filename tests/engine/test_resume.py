"""A killed run continues as if it had not been killed: a real process, a real SIGKILL, the same bits at the end."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import kill_runs
import open_clip
import processes
import pytest
import runs
import torch
from safetensors.torch import load_file
from tiny_run import tiny_arguments

STAGES = ("heads", "lora")
ITERATIONS = 5


def _arguments(train, output: Path) -> list[str]:
    keys = {"DATALOADER.NUM_WORKERS": 1, "VISFT.SOLVER.LORA.ACCUMULATE": 2}
    for stage in ("HEADS", "LORA"):
        keys |= {f"VISFT.SOLVER.{stage}.MAX_ITER": ITERATIONS, f"VISFT.SOLVER.{stage}.CHECKPOINT_PERIOD": 2}
    return [*tiny_arguments(train, None, output), *runs.words(keys)]


@pytest.fixture(scope="module")
def uninterrupted(shapes_train, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A run that nobody kills, and how long its stages took."""
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
    return folder / "run", {"heads": began["lora"] - began["heads"], "lora": end - began["lora"]}


def _run_and_kill(train, folder: Path, durations: dict[str, float], rng: random.Random, kills: int) -> int:
    """Run with --resume until it ends, killing it `kills` times; returns how many kills struck."""
    log, struck = folder / "log", 0
    arguments = _arguments(train, folder / "run")
    for attempt in range(kills + 1):
        resumed = runs.option(arguments, "--resume") if attempt else arguments
        process = processes.start("train_net.py", resumed, log)
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


def test_three_kills(shapes_train, uninterrupted, tmp_path):
    """At any moments."""
    whole, durations = uninterrupted
    seed = time.time_ns() % 1000
    print(f"seed {seed}")
    rng, struck = random.Random(seed), 0
    for attempt in range(5):
        (tmp_path / str(attempt)).mkdir()
        struck = _run_and_kill(shapes_train, tmp_path / str(attempt), durations, rng, kills=3)
        runs.assert_same_end(runs.end(tmp_path / str(attempt) / "run", *STAGES), runs.end(whole, *STAGES))
        if struck:
            break
        # Measured on a busy machine, the stages seemed longer than they are now.
        durations = {stage: seconds / 2 for stage, seconds in durations.items()}
    assert struck >= 1, "no kill struck while the run was alive"


@pytest.mark.slow
def test_twenty_kills_half_of_them_while_a_file_is_written(shapes_train, tmp_path):
    counts = kill_runs.kill_and_resume(shapes_train, tmp_path, kills=20, seed=time.time_ns() % 1000)
    assert counts["struck"] == 20 and counts["left_half_written"] >= 5 and counts["finished"]
    assert counts["broken"] == counts["different"] == 0, counts


@pytest.fixture
def copied(shapes_train, uninterrupted, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the finished run, and its arguments."""
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    return tmp_path / "run", _arguments(shapes_train, tmp_path / "run")


def test_finished_stage_is_not_repeated_and_lora_starts_from_its_heads(copied, uninterrupted, tmp_path):
    run, arguments = copied
    heads = run / "heads" / f"model_{ITERATIONS:07d}.safetensors"
    before = heads.stat().st_mtime_ns
    shutil.rmtree(run / "lora")
    log = runs.train(runs.option(arguments, "--resume"), tmp_path / "log")
    assert heads.stat().st_mtime_ns == before
    # Stage lora, run alone from the heads on the disk, ends as it did in one go.
    runs.assert_same_end(runs.end(run, *STAGES), runs.end(uninterrupted[0], *STAGES))
    assert "threads per process" not in log


def test_resuming_with_other_threads_says_what_it_costs(copied, tmp_path):
    run, arguments = copied
    state = json.loads((run / "run.json").read_text())
    assert state["threads"] == 1
    (run / "run.json").write_text(json.dumps(state | {"threads": 3}))
    log = runs.train(runs.option(arguments, "--resume"), tmp_path / "log")
    assert "started with 3 threads per process and continues with 1" in log


def test_without_resume_an_earlier_run_is_kept_aside(copied, tmp_path):
    run, arguments = copied
    heads_alone = ["VISFT.STAGES", "('heads',)", "VISFT.SOLVER.HEADS.MAX_ITER", "2"]
    runs.train([*arguments, *heads_alone], tmp_path / "log")
    assert (run / "earlier-1" / "heads" / f"model_{ITERATIONS:07d}.safetensors").is_file()
    assert (run / "heads" / "model_0000002.safetensors").is_file()


# Other kinds of runs, killed in each of their stages

LORA = {"VISFT.STAGES": "('lora',)"}
KINDS = {
    "full": LORA
    | {
        "MODEL.VISFT.TUNE": "full",
        "MODEL.CLIP_VIT.LAYER_DECAY": 0.8,
        "MODEL.CLIP_VIT.PRETRAINED": "demo",
        "VISFT.EXPORT": "('open_clip',)",
    },
    "one stage": LORA | {"MODEL.VISFT.FREEZE_HEADS": False},
    "without heads": LORA
    | {
        "MODEL.VISFT.HEADS": "()",
        "MODEL.VISFT.OBJECTIVES": "('anchor', 'contrastive', 'self_distillation')",
    },
    "in turn": {
        "VISFT.TASK_MIXING": "ratio",
        "VISFT.TASK_RATIOS": "(0.4, 0.6)",
        "VISFT.TASKS.DETECTION.IMS_PER_BATCH": 4,
        "VISFT.TASKS.SEGMENTATION.SIZE": 48,
        "VISFT.SOLVER.HEADS.MAX_ITER": 6,
        "VISFT.SOLVER.LORA.ACCUMULATE": 2,
        "DATALOADER.NUM_WORKERS": 1,
    },
}


class Kind:
    """A kind of run: its name, its stages, and the arguments that write it to a folder."""

    def __init__(self, name: str, train, test, captions: Path) -> None:
        self.name, self.stages = name, ("lora",) if "VISFT.STAGES" in KINDS[name] else STAGES
        self.keys = runs.words(KINDS[name] | {"VISFT.DATA.TRAIN_CAPTIONS": captions})
        self.data = train, test if name == "without heads" else None

    def arguments(self, output: Path) -> list[str]:
        return [*tiny_arguments(*self.data, output), *self.keys]


@pytest.fixture(scope="module", params=KINDS)
def whole(request, shapes_train, shapes_test, shapes_captions, tmp_path_factory) -> tuple[Kind, Path, str]:
    """A run of each kind that nobody kills, and its log."""
    kind = Kind(request.param, shapes_train, shapes_test, shapes_captions)
    folder = tmp_path_factory.mktemp("kind")
    return kind, folder, runs.train(kind.arguments(folder), folder / "log")


def test_every_kind_goes_on_to_the_bit(whole, tmp_path):
    kind, folder, _ = whole
    run, arguments = tmp_path / "run", kind.arguments(tmp_path / "run")
    for stage in kind.stages:
        checkpoint = run / stage / "last_checkpoint"
        runs.killed_when(checkpoint.is_file, arguments, tmp_path / f"{stage}.log")
        assert checkpoint.read_text() == "model_0000002.safetensors"
        arguments = runs.option(kind.arguments(run), "--resume")
    log = runs.train(arguments, tmp_path / "log")
    assert f"resumed stage `{stage}` after iteration 2" in log
    runs.assert_same_end(runs.end(run, *kind.stages), runs.end(folder, *kind.stages))


def _checkpoint(folder: Path) -> tuple[set[str], dict]:
    """The names and the settings of stage lora's last checkpoint."""
    about = json.loads((folder / "lora" / "model_0000004.json").read_text())
    return set(load_file(folder / "lora" / "model_0000004.safetensors")), about["settings"]


@pytest.mark.parametrize("whole", ["full"], indirect=True)
def test_full_keeps_and_exports_the_tuned_tower(whole):
    _, folder, log = whole
    names, about = _checkpoint(folder)
    assert all(name.startswith("backbone.tower.") for name in names) and len(names) > 90
    assert about["tune"] == "full" and "lora" not in about
    assert 0 < log.find("stage lora will go through fresh heads") < log.find("stage lora: iterations 0")

    base = open_clip.create_model("visft-tiny", pretrained="demo").eval()
    file = folder / "export" / "visft_backbone.safetensors"
    exported = open_clip.create_model("visft-tiny", pretrained=str(file)).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before, found = base.encode_image(images), exported.encode_image(images)
        # By hand: the checkpoint's tensors in the place of the base's.
        tuned = load_file(folder / "lora" / "model_0000004.safetensors")
        state = {n.removeprefix("backbone.tower."): t for n, t in tuned.items()}
        assert base.visual.load_state_dict(state, strict=False).unexpected_keys == []
        expected = base.encode_image(images)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - before).norm() > 1e-3 * before.norm()
    texts = open_clip.get_tokenizer("visft-tiny")(["a dog"])
    assert torch.equal(base.encode_text(texts), exported.encode_text(texts))


@pytest.mark.parametrize("whole", ["one stage"], indirect=True)
def test_one_stage_keeps_heads_beside_lora_and_is_evaluated(whole, shapes_train, shapes_test, tmp_path):
    kind, folder, log = whole
    names, about = _checkpoint(folder)
    heads = {name.split(".")[1] for name in names if name.startswith("heads.")}
    assert heads == {"detection", "segmentation"}
    assert any("lora_A" in name for name in names) and about["lora"]["rank"] == 2
    assert "through fresh heads" not in log

    arguments = [*tiny_arguments(shapes_train, shapes_test, tmp_path / "e"), *kind.keys]
    arguments += ["MODEL.WEIGHTS", str(folder)]
    runs.train(runs.option(arguments, "--eval-only"), tmp_path / "log")
    assert "segmentation/segm/AP50" in json.loads((tmp_path / "e" / "evaluation.json").read_text())


@pytest.mark.parametrize("whole", ["without heads"], indirect=True)
def test_without_heads_every_objective_trains_lora_alone(whole):
    _, folder, log = whole
    assert "fresh heads" not in log and all("lora_" in name for name in _checkpoint(folder)[0])
    last = runs.rows(folder / "lora" / "metrics.json")[-1]
    losses = {name for name in last if name.endswith("/loss")}
    assert losses == {"anchor/loss", "contrastive/loss", "self_distillation/loss"}


@pytest.mark.parametrize("whole", ["in turn"], indirect=True)
def test_in_turn_each_head_trains(whole):
    """In stage heads too, each in the iterations that draw it: AdamW has its moments for every head."""
    _, folder, _ = whole
    moments = {n: t for n, t in runs.end(folder, "heads").items() if n.startswith("trainer")}
    assert any(tensor.abs().sum() > 0 for tensor in moments.values())
    names = {name for row in runs.rows(folder / "heads" / "metrics.json") for name in row}
    assert {"detection/loss_ce", "segmentation/loss_ce"} <= names
