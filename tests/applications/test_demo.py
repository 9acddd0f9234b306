"""The demo from end to end, shortened: what `make demo` promises is there, and loads without visft."""

import functools
import json
import os
import subprocess
import sys

import processes
import pytest
import runs

from towerbench import resolve
from visft.applications import demo

LOADER = """
import sys, open_clip
model = open_clip.create_model("local-dir:" + sys.argv[1])
assert "visft" not in sys.modules
print(sum(p.numel() for p in model.visual.parameters()))
"""


SOME = ("goi zero-shot", "dense text", "zero-shot emoji")


def shortened() -> None:
    """The demo with some of its benchmarks, on some of their images, and on some of the pretraining's classes."""
    from demoworld import views
    from towerbench.demo import emoji, unseen

    processes.read_exports_here()
    demo._SUITE = {name: words for name, words in demo._SUITE.items() if name in SOME}
    unseen.COUNTS = dict.fromkeys(unseen.COUNTS, 30)
    few = emoji.unseen()[::8]
    emoji.unseen = lambda: few
    views.Views = functools.partial(views.Views, 200)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((SOME, shortened), id="some"),
        pytest.param((tuple(demo._SUITE), None), id="all", marks=pytest.mark.slow),
    ],
)
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    names, before = request.param
    arguments = ["--num-train", "12", "--num-val", "12", "--num-unseen", "6"]
    short = {"VISFT.SOLVER.HEADS.MAX_ITER": 2, "VISFT.SOLVER.LORA.MAX_ITER": 2, "DATALOADER.NUM_WORKERS": 0}
    arguments += runs.words(short | {"OUTPUT_DIR": folder / "out"})
    data = {"VISFT_DEMO_DATA": str(folder / "data")}
    status, printed = processes.run("demo.py", arguments, folder / "log", timeout=900, before=before, **data)
    assert status == 0, printed[-2000:]
    return folder / "out", printed, names


def test_report_has_figures_before_and_after(finished):
    folder, _, _ = finished
    steps = json.loads((folder / "run.json").read_text())["evaluations"]
    assert list(steps) == ["start", "lora"]  # EVAL_BETWEEN_STAGES is False
    report = json.loads((folder / "report.json").read_text())
    for side in ("before", "after"):
        for name in ("detection/bbox/AP50", "segmentation/segm/AP50", "zero_shot/top1"):
            assert 0 <= report[side][name] <= 100
        assert 0 <= report[side]["open_vocabulary/segmentation/segm/AP50"] <= 100
    # The shipped tower's and heads' figures are far over what random weights reach (about 0 and 0.07).
    assert report["before"]["zero_shot/top1"] > 40
    assert report["before"]["detection/bbox/AP50"] > 5
    assert report["before"]["segmentation/segm/AP50"] > 5
    assert (folder / "report.md").read_text().count("|") > 20


def test_report_has_what_was_never_tuned_on(finished):
    folder, _, suite = finished
    report = json.loads((folder / "report.json").read_text())
    results = json.loads((folder / "out_of_domain" / "results.json").read_text())
    rows = {row["name"]: row for row in results["benchmarks"]}
    assert set(rows) == set(suite)
    for name, row in rows.items():
        assert report["before"][f"out_of_domain/{name}"] == row["base"]
        assert report["after"][f"out_of_domain/{name}"] == row["tuned"]
        assert row["low"] <= row["difference"] <= row["high"]
    assert [row["name"] for row in report["out_of_domain"]] == [*rows, "mean"]
    # What the shipped tower reaches, and two iterations hardly change.
    zero_shot = rows["zero-shot emoji"]
    assert zero_shot["base"] > 40 and abs(zero_shot["difference"]) < 5


def test_every_benchmark_of_the_short_suite_is_there():
    assert {benchmark.name for benchmark in resolve(tuple(demo._SUITE))} == set(demo._SUITE) and len(
        demo._SUITE
    ) == 6


def test_images_and_curves_are_drawn(finished):
    folder, _, _ = finished
    assert list((folder / "predictions").glob("*.png"))
    assert (folder / "loss_curves.png").stat().st_size > 1000


def test_page_shows_scenes_of_unseen_things(finished):
    folder, _, suite = finished
    assert len(list((folder / "unseen").glob("scene_*.png"))) == 4
    page = (folder / "report.html").read_text()
    # Four scenes in three ways before and after, the forest plot, the losses and four predictions.
    assert page.count("data:image/png;base64,") == 4 * 3 * 2 + 2 + 4
    scenes, unseen, known = map(
        page.index, ("<h3>Scene 1", "no training scene showed", "Known things, on unseen")
    )
    assert scenes < unseen < known
    assert all(demo._SUITE[name] in page for name in suite)


def test_tower_loads_without_visft(finished, tmp_path):
    folder, _, _ = finished
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder / "export")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 3_000_000


def test_last_lines_begin_with_what_was_never_tuned_on(finished):
    folder, printed, suite = finished
    tail = printed[-4000:]
    unseen = tail.index("Things that no training scene showed")
    known = tail.index("Known things, on unseen scenes")
    for words in [demo._SUITE[name] for name in suite] + [
        "mean of their families",
        "masks found and named, AP50",
    ]:
        assert unseen < tail.index(words) < known
    last = ["boxes, AP50", "masks, AP50", "captions, CIDEr-D", str(folder / "report.md"), "report.html"]
    assert all(tail.index(words) > known for words in last)


def test_what_fell_is_said(tmp_path):
    rows = [{"name": n, "base": 10.0, "tuned": t, "difference": t - 10, "low": t - 11, "high": t - 9}
            for n, t in (("goi zero-shot", 40.0), ("few-shot digits", 9.0), ("mean", 24.5))]  # fmt: skip
    sides = [
        {"detection/bbox/AP50": v, "open_vocabulary/segmentation/segm/AP50": 9.0 - v} for v in (5.0, 4.0)
    ]
    content = {"before": sides[0], "after": sides[1], "out_of_domain": rows}
    (tmp_path / "report.json").write_text(json.dumps(content))
    lines = demo.summary(tmp_path)
    assert "What fell: digits by a linear probe, boxes.\n" in lines
    assert "+30.0 (+29.0 to +31.0)" in lines and "masks found and named, AP50" in lines
