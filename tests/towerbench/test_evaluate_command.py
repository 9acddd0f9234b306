"""The command that evaluates towers: names of suites, arguments, and what it says of what it leaves out."""

import re

import my_benchmark
import pytest

from demoworld import tower as demo_tower
from towerbench import __main__ as evaluate
from towerbench import registry, towers
from visft.commands import evaluate_backbone

TINY = demo_tower.NAME


def test_suites_families_and_names():
    every = registry.registered()
    demo = {cls.name for cls in registry.resolve("demo")}
    assert {"zero-shot emoji", "few-shot digits", "retrieval scenes", "robustness emoji", "quarters"} <= demo
    assert {cls.name for cls in registry.resolve("few-shot") if cls.suite == "demo"} < demo
    named = [cls.name for cls in registry.resolve("quarters, retrieval")]
    assert named == ["quarters", *sorted(name for name in every if every[name].family == "retrieval")]
    assert "retrieval scenes" in named
    for suite_name in registry.SUITES:
        of_suite = registry.resolve(f"{suite_name}/retrieval")
        assert of_suite == [cls for cls in registry.resolve("retrieval") if cls.suite == suite_name] != []
    for cls in every.values():
        assert cls.metric and cls.__doc__ or cls.__module__ in (__name__, "my_benchmark")


def test_labels():
    assert towers.labels(["a/x.safetensors", "b/y.pt"]) == ["x", "y"]
    files = [f"{run}/export/t.safetensors" for run in ("run1", "run2")]
    assert towers.labels(files) == ["run1/export/t", "run2/export/t"]


ONE_SUITE = "--suite {}: names benchmarks of .*demo/FAMILY or real/FAMILY for a family, and one suite a run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--suite=retreival", "--suite: `retreival` is no suite, .*; the nearest is `retrieval`"),
        ("--suite=real/retreival", "the nearest is `real/retrieval`"),
        ("--suite=retrieval --data=.", ONE_SUITE.format("retrieval")),
        ("--suite=demo,real --data=.", ONE_SUITE.format("demo,real")),
        ("--suite=few-shot/vendor,few-shot", "`few-shot/vendor` is no suite, family or benchmark"),
        ("--model=visft-tinny", "the nearest name is 'visft-tiny'"),
        ("--pretrained=laion2b", "--pretrained laion2b: .*its tags are: demo"),
        ("--compare=nowhere.safetensors", "--compare nowhere.safetensors: .*does not exist"),
        ("--pictures=nowhere", "--pictures nowhere: there is no such folder"),
        ("--data=nowhere", "--data nowhere: there is no such folder"),
        ("--seeds=0", "--seeds 0: at least 1"),
    ],
)
@pytest.mark.parametrize("main", [evaluate.main, evaluate_backbone.main], ids=["open_clip's", "visft's"])
def test_bad_arguments_are_one_sentence(main, change, message, tmp_path, capsys):
    words = [f"--model={TINY}", "--pretrained=demo", f"--output={tmp_path / 'out'}", *change.split()]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def main(*changes, output):
    words = ["--model", TINY, "--pretrained", "demo", "--output", str(output)]
    return evaluate.main([*words, *map(str, changes)])


def test_what_is_left_out_is_said_at_the_start(tmp_path, caplog, capsys):
    assert main("--suite", "quarters,zero-shot vendor", "--seeds", 1, output=tmp_path / "out") == 0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "not run: zero-shot vendor: needs --pictures"
    assert not any("not run: quarters" in line for line in lines)
    caplog.clear()
    assert main("--suite", "few-shot vendor,retrieval urban-1k", output=tmp_path / "no") == 1
    few_shot, retrieval = [record.getMessage() for record in caplog.records]
    assert few_shot == "not run: few-shot vendor: needs --pictures"
    assert retrieval.startswith("not run: retrieval urban-1k: needs --data DIR with Urban1k")
    assert "nothing can be run, for the 2 reasons above" in capsys.readouterr().err
    assert main("--suite", "zero-shot vendor", output=tmp_path / "no") == 1
    assert "nothing can be run, `zero-shot vendor` needs --pictures" in capsys.readouterr().err


def test_a_family_of_one_suite_beside_data(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    assert main("--suite", "real/retrieval", "--data", data, output=tmp_path / "no") == 1
    assert "nothing can be run" in capsys.readouterr().err
    assert main("--suite", "quarters", "--data", data, "--seeds", 1, output=tmp_path / "out") == 0


def test_stopped_from_the_keyboard(tmp_path, capsys, monkeypatch):
    def items(benchmark, tower, images, seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(my_benchmark.Quarters, "items", items)
    assert main("--suite", "quarters", output=tmp_path) == 130
    assert "stopped from the keyboard (the same command continues)" in capsys.readouterr().err
