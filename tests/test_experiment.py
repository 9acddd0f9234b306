"""The experiment's script: finished runs outlive their folder, derived towers are what their arm says, broken plans."""

import argparse
import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import arm_runs
import arm_tables
import arms
import numpy as np
import pytest
import runs
import small_towers
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from demoworld import dataset
from demoworld.tower import WEIGHTS_FILE
from towerbench import Benchmark, Images, registry
from visft import model_zoo
from visft.checkpoint import load
from visft.engine import evaluate, settings, stages
from visft.engine.run_vocabulary import with_vocabulary
from visft.errors import ConfigError
from visft.export import verification

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "demo_ood" / "run.py"

BOXES = {
    "MODEL.VISFT.HEADS": ["detection"],
    "MODEL.VISFT.HEAD_FILES": ["visft://heads_demo_detection.safetensors"],
}
PLAN = {
    "config": "visft_demo",
    "suite": "agreement, norm",
    "demo_world": {"train": 24, "val": 4, "first": 3},
    "settings": {
        "VISFT.STAGES": ["lora"],
        "DATASETS.TEST": [],
        "MODEL.VISFT.OBJECTIVES": [],
        "DATALOADER.NUM_WORKERS": 0,
        "VISFT.SOLVER.LORA.IMS_PER_BATCH": 2,
        "VISFT.SOLVER.LORA.MAX_ITER": 3,
        "VISFT.SOLVER.LORA.WARMUP_ITERS": 0,
        "VISFT.SOLVER.LORA.CHECKPOINT_PERIOD": 1,
    },
    "against": ["boxes"],
    "arms": {
        "boxes": {"label": "boxes alone", "seeds": 2, "set": BOXES},
        "half": {"label": "half way", "seeds": 1, "of": "boxes", "interpolate": 0.5},
        "first": {"label": "after one iteration", "seeds": 1, "of": "boxes", "iteration": 1},
    },
}
SOME_FAMILIES = {"label": "a quarter", "seeds": 1, "of": "boxes", "interpolate": 0.25, "suite": "norm"}


def module(name: str = "run"):
    spec = importlib.util.spec_from_file_location(f"demo_ood_{name}", SCRIPT.with_name(f"{name}.py"))
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


class Agreement(Benchmark):
    """How near an image's embedding is to that of its mirror image: cheap, and another for every tower."""

    name, family, metric = "agreement", "few-shot", "cosine"

    def images(self, seed):
        rng = np.random.default_rng(seed)
        views = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(12)]
        return {
            "views": Images(f"agreement/{seed}", 12, lambda: views),
            "mirrored": Images(f"agreement/{seed}/m", 12, lambda: [view[:, ::-1].copy() for view in views]),
        }

    def items(self, tower, images, seed):
        first, second = (F.normalize(tower.embeddings(each), dim=1) for each in images.values())
        return (first * second).sum(1).numpy()


class Norm(Agreement):
    """The same of another family."""

    name, family, max_seeds = "norm", "dense", 1

    def items(self, tower, images, seed):
        return tower.embeddings(images["views"]).norm(dim=1).numpy() / 100


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The suite of the plan, for this module alone."""
    known = registry.registered()  # all are imported now, so that none is forgotten with the copy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registry", dict(known))
        registry.register(Agreement)
        registry.register(Norm)
        patch.setattr(verification, "read", small_towers.read_here)  # its processes are tested elsewhere
        yield


def write(folder: Path, plan: dict) -> Path:
    file = folder / "arms.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return file


def places(folder: Path) -> list[str]:
    places = {"--plan": folder / "arms.yaml", "--output": folder / "out", "--results": folder / "kept"}
    return runs.words(places)


def run(folder: Path, *words: str) -> int:
    """The command, in this process: its jobs too, so that they know the benchmarks above."""
    script, arguments = module(), places(folder)

    def process(args, arm, seed):
        (folder / "jobs.txt").open("a").write(f"{arm.name if arm else 'base'} {seed}\n")
        return main("--job", arm.name if arm else "base", str(seed))

    def main(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--workers", "1", *words])
            return script.main()

    script._process = process
    return main(*words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    write(folder, PLAN)
    assert run(folder) == 0
    return folder


def kept(folder: Path) -> dict[str, bytes]:
    files = (folder / "kept" / "scores").rglob("*.npz")
    return {file.name.rsplit("-", 1)[0]: file.read_bytes() for file in files}


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / "out" / "runs").glob(f"{name}-*/export/visft_backbone.safetensors")
    return load_file(file)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def test_every_run_is_kept_and_none_is_repeated(finished):
    before = kept(finished)
    assert set(before) == {"base-0", "base-1", "boxes-0", "boxes-1", "half-0", "first-0"}
    jobs = (finished / "jobs.txt").read_text()
    assert jobs.split("\n")[:4] == ["base 0", "base 1", "boxes 0", "boxes 1"]
    assert run(finished) == 0
    assert (finished / "jobs.txt").read_text() == jobs
    assert kept(finished) == before


def test_weights_that_are_gone_are_trained_again_once_before_what_is_of_them(finished, tmp_path):
    """As on another machine, where the kept scores are all there is: no two processes train in one folder."""
    shutil.copytree(finished / "kept", tmp_path / "kept")
    write(tmp_path, PLAN)
    before = kept(tmp_path)
    for name in ("half", "first"):
        next((tmp_path / "kept").rglob(f"{name}-0-*.npz")).unlink()
    assert run(tmp_path) == 0
    assert (tmp_path / "jobs.txt").read_text().split("\n") == ["boxes 0", "half 0", "first 0", ""]
    again = kept(tmp_path)
    assert set(again) == set(before) and again["boxes-0"] == before["boxes-0"]
    assert same(exported(tmp_path, "half-0"), exported(finished, "half-0"))


def test_weights_that_are_gone_are_trained_again_when_asked_for(finished, tmp_path):
    shutil.copytree(finished / "kept", tmp_path / "kept")
    write(tmp_path, PLAN)
    before = kept(tmp_path)
    assert run(tmp_path, "--arms", "boxes") == 0 and not (tmp_path / "jobs.txt").exists()
    assert run(tmp_path, "--arms", "boxes", "--weights") == 0
    assert (tmp_path / "jobs.txt").read_text().split("\n") == ["boxes 0", "boxes 1", ""]
    assert kept(tmp_path) == before
    assert same(exported(tmp_path, "boxes-1"), exported(finished, "boxes-1"))
    assert run(tmp_path, "--arms", "boxes", "--weights") == 0
    assert (tmp_path / "jobs.txt").read_text().split("\n") == ["boxes 0", "boxes 1", ""]


def test_the_chosen_arm_is_the_demos_recipe():
    """What it trains with is visft_demo.yaml, word for word but for what every arm sets."""
    plan = arms.read(SCRIPT.with_name("region_text.yaml"))
    arm = plan.arms["chosen"]
    chosen = settings.load_config(plan.config, settings.words(arm.opts))
    demo = model_zoo.get_config("visft_demo")
    assert arm.first_scene == dataset.SCENES_OF_HEADS + 1
    for cfg in (chosen, demo):
        cfg.VISFT.STAGES, cfg.DATASETS.TEST, cfg.VISFT.SOLVER.LORA.CHECKPOINT_PERIOD = (), (), 0
    assert chosen == demo


def test_logs_of_trainings_are_kept(finished):
    """A head's losses add up to the total, as nearly as medians do."""
    files = sorted((finished / "kept" / "logs").glob("*.csv"))
    assert [file.name.rsplit("-", 1)[0] for file in files] == ["boxes-0", "boxes-1"]
    for file in files:
        rows = list(csv.DictReader(file.open()))
        assert rows[-1]["iteration"] == "3"
        last = {name: float(value) for name, value in rows[-1].items()}
        others = ("iteration", "lr", "grad_norm", "total_loss")
        parts = sum(value for name, value in last.items() if name not in others)
        assert last["detection"] > 0 and parts == pytest.approx(last["total_loss"], rel=0.1)
        assert float(rows[-1]["grad_norm"]) > 0


def test_derived_towers_are_what_their_arm_says(finished):
    base, tuned, half = load_file(WEIGHTS_FILE), exported(finished, "boxes-0"), exported(finished, "half-0")
    moved = [name for name in tuned if not torch.equal(tuned[name], base[name].float())]
    assert moved and all(name.startswith("visual.") for name in moved)
    for name in moved:
        torch.testing.assert_close(half[name], (base[name].float() + tuned[name]) / 2, rtol=1e-5, atol=1e-7)
    first = exported(finished, "first-0")
    assert not all(torch.equal(first[name], tuned[name]) for name in moved)


def test_the_report_needs_the_kept_scores_alone_and_is_drawn_again_from_its_results(finished, tmp_path):
    shutil.copytree(finished / "kept", tmp_path / "kept")
    write(tmp_path, PLAN)
    assert run(tmp_path, "--report") == 0
    results = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert [tower["label"] for tower in results["towers"]] == ["base", "boxes", "half", "first"]
    pairs = [(pair["first"], pair["second"]) for pair in results["pairs"]]
    assert pairs == [("boxes", "half"), ("boxes", "first")]
    assert {row["name"] for row in results["families"]["boxes"]} == {"few-shot", "dense"}
    # The differences in the table are those of the scores' means, computed here anew; a benchmark without seeds has one
    # row of the base for all.
    kept_files = {n: next((tmp_path / "kept").rglob(f"{n}-*.npz")) for n in kept(tmp_path)}
    scores = {name: np.load(file) for name, file in kept_files.items()}
    rows = {row["name"]: row for row in results["benchmarks"]["boxes"]}
    for name, bases in (("agreement", ("base-0", "base-1")), ("norm", ("base-0", "base-0"))):
        pairs = zip(bases, ("boxes-0", "boxes-1"), strict=True)
        change = np.mean([scores[tuned][name].mean() - scores[base][name].mean() for base, tuned in pairs])
        assert rows[name]["difference"] == pytest.approx(100 * change, abs=0.006)
    files = ["report.md", "report.html", "overview.md"]
    drawn = {name: (tmp_path / "kept" / name).read_bytes() for name in files}
    for name in files:
        (tmp_path / "kept" / name).unlink()
    shutil.rmtree(tmp_path / "kept" / "scores")
    assert run(tmp_path, "--redraw") == 0
    assert {name: (tmp_path / "kept" / name).read_bytes() for name in files} == drawn
    assert all(f"| {arm} |" in drawn["overview.md"].decode() for arm in PLAN["arms"])


def test_the_table_of_the_model_zoo_is_that_of_the_results():
    text, short = (document.read_text() for document in arm_tables.DOCUMENTS)
    for folder, place in arm_tables.PLACES.items():
        found = json.loads((folder / "results.json").read_text())
        assert arm_tables.filled(text, found, place) == text and arm_tables.overview(found) in text
        assert arm_tables.filled(short, found, place) == short
    found = json.loads((arm_tables.RESULTS / "results.json").read_text())
    (row,) = [row for row in found["families"]["recipe"] if row["name"] == "goi"]
    assert f"{row['difference']:+.2f}" in arm_tables.overview(found)
    # Every pair is in the row of its second arm, below the first one's name.
    head, _, *table = arm_tables.overview(found).split("one arm minus another:\n\n")[1].splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in table}
    assert found["pairs"]
    for pair in found["pairs"]:
        place = columns.index(f"{pair['first']} minus this arm")
        assert cells[pair["second"]][place] == f"{pair['mean']['difference']:+.2f}"
        assert cells[pair["second"]][place + 2] == (pair["mean"]["verdict"] or "")


def test_captions_are_scored_as_evaluation_scores_them(finished, tmp_path):
    (folder,) = (finished / "out" / "runs").glob("boxes-0-*")
    script = module("captions")
    lines = script.run(argparse.Namespace(runs=[str(folder)], scenes=8, output=str(tmp_path / "scenes")))
    words = ["MODEL.VISFT.HEADS", "('captioning',)", "DATALOADER.NUM_WORKERS", "0"]
    words += ["MODEL.VISFT.HEAD_FILES", "('visft://heads_demo_captioning',)"]
    for line, run in zip(lines, (None, folder), strict=True):
        config = str(run / "config.yaml") if run else model_zoo.get_config_file("visft_demo")
        cfg = with_vocabulary(settings.load_config(config, [*words, "DATASETS.TEST", "('visft_demo_val',)"]))
        model = stages.initial_model(cfg, 0).eval()
        if run:
            load.load_tower(model.backbone, run / "lora")
        figures = evaluate.evaluate(cfg, model)
        assert f": CIDEr-D {figures['captioning/CIDEr']:.1f}, loss " in line


def test_an_arm_is_reported_with_the_seeds_that_are_finished(finished, tmp_path):
    shutil.copytree(finished / "kept" / "scores", tmp_path / "kept" / "scores")
    write(tmp_path, PLAN)
    next((tmp_path / "kept").rglob("boxes-1-*.npz")).unlink()
    next((tmp_path / "kept").rglob("first-0-*.npz")).unlink()
    assert run(tmp_path, "--report") == 0
    results = json.loads((tmp_path / "kept" / "results.json").read_text())
    towers = [(tower["label"], tower.get("seeds")) for tower in results["towers"][1:]]
    assert towers == [("boxes", 1), ("half", 1)]
    assert [(pair["first"], pair["second"]) for pair in results["pairs"]] == [("boxes", "half")]


def test_a_failed_run_is_named_and_what_is_finished_is_kept(tmp_path, caplog):
    broken = {"label": "broken", "seeds": 1, "set": BOXES | {"VISFT.SOLVER.LORA.BASE_LR": 1e30}}
    write(tmp_path, PLAN | {"arms": {"broken": broken}, "against": []})
    assert run(tmp_path) != 0
    assert set(kept(tmp_path)) == {"base-0"}


def test_a_job_is_a_process_with_one_thread_and_a_log(tmp_path, monkeypatch, capsys):
    broken = {"a": {"label": "a", "seeds": 1, "set": {"NO.SUCH": 1}}}
    write(tmp_path, PLAN | {"suite": "zero-shot emoji", "arms": broken, "against": []})
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *places(tmp_path), "--workers", "1"])
    assert module().main() != 0
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "failed: a, seed 0; the same command tries them again" in error
    assert "NO.SUCH" in (tmp_path / "out" / "logs" / "a-0-test.log").read_text()
    assert set(kept(tmp_path)) == {"base-0"}


def test_arms_of_some_families_are_in_no_pair(tmp_path):
    plan = arms.read(write(tmp_path, PLAN | {"arms": PLAN["arms"] | {"quarter": SOME_FAMILIES}}))
    assert plan.pairs == [("boxes", "half"), ("boxes", "first")]


ANIMALS = {
    "images": [{"id": 1}, {"id": 2}],
    "categories": [{"id": i, "name": name} for i, name in enumerate("dog cat cow bee ant".split(), start=3)],
    "annotations": [{"id": i, "image_id": 1 + i % 2, "category_id": 3 + i % 5} for i in range(20)],
}


def test_shuffled_names_leave_no_category_its_own():
    for seed in range(5):
        found = arms.changed(ANIMALS, 0, "shuffled", seed)
        before, after = ([row["name"] for row in c["categories"]] for c in (ANIMALS, found))
        assert sorted(before) == sorted(after) and all(a != b for a, b in zip(before, after, strict=True))
        assert found["annotations"] == ANIMALS["annotations"] and found["images"] == ANIMALS["images"]
    assert arms.changed(ANIMALS, 0, "shuffled", 1) != arms.changed(ANIMALS, 0, "shuffled", 2)


def test_fewer_categories_are_part_of_more():
    three, two = (arms.changed(ANIMALS, count, "", 0) for count in (3, 2))
    ids = [{row["id"] for row in found["categories"]} for found in (three, two)]
    assert len(ids[0]) == 3 and len(ids[1]) == 2 and ids[1] < ids[0]
    assert {row["category_id"] for row in three["annotations"]} == ids[0]
    assert len(three["annotations"]) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": {"label": "a", "seeds": 1, "names": "swapped"}}}, "known is `shuffled`"),
        ({"arms": {"a": {"label": "a", "seeds": 1, "sett": {}}}}, "arm `a` has an entry `sett`"),
        ({"arms": {"a": {"label": "a", "seeds": 1, "of": "b"}}}, "arm `a` is of `b`, but no arm before it"),
        ({"arms": {"a": {"seeds": 1}}}, "is not a valid list of arms"),
        ({"against": ["nobody"]}, "nobody"),
    ],
)
def test_broken_plans(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        arms.read(write(tmp_path, PLAN | change))


def test_report_without_finished_arms_says_what_to_do(tmp_path):
    plan = arms.read(write(tmp_path, PLAN))
    with pytest.raises(ConfigError, match="no arm is finished"):
        arm_tables.results(arm_runs.Runs(plan, tmp_path / "out", tmp_path / "kept", "test"))
