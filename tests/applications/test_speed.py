"""The benchmark's parts are what they say, its table what it measured."""

import json
import time

import pytest
import runs
from batches_of_processes import BOTH, build, picture
from tiny_run import tiny_arguments

from visft.applications.speed import measure, summary
from visft.commands import benchmark as command
from visft.engine.optimizer import build_optimizer
from visft.engine.settings import load_config
from visft.engine.trainer import StageTrainer

IMAGES = [picture((2, BOTH), 1), picture((1, BOTH), 2)]


def trainer_of(stage: str) -> StageTrainer:
    model = build(stage)
    optimizer = build_optimizer(model, load_config(None).VISFT.SOLVER[stage.upper()])
    return StageTrainer(model, iter(()), optimizer, stage=stage)


@pytest.fixture
def nap(monkeypatch):
    """A clock that only naps move on, so that times are exact whatever the machine does; `nap(seconds)` is one."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def take(seconds: float) -> None:
        now[0] += seconds

    return take


def adapter(trainer: StageTrainer, block: int):
    """The LoRA of a block's queries: a module that every pass of the tower calls once."""
    modules = trainer.model.backbone.named_modules()
    return next(module for name, module in modules if name.endswith(f"resblocks.{block}.lora.q"))


@pytest.mark.parametrize("stage", ["heads", "lora"])
def test_time_is_told_where_it_is_spent(stage, nap):
    """Against naps of known length in the tower, in one head, and in the optimizer."""
    trainer = trainer_of(stage)
    passes = []

    def slow_tower(module, inputs):
        passes.append(len(inputs[0]))
        nap(1)

    adapter(trainer, block=0).register_forward_pre_hook(slow_tower)
    losses = trainer.model.heads["segmentation"].losses
    trainer.model.heads["segmentation"].losses = lambda *a: (nap(2), losses(*a))[1]
    trainer.optimizer.register_step_pre_hook(lambda *a: nap(4))
    before = [p.detach().clone() for p in trainer.parameters]
    rounds = measure(trainer, IMAGES, rounds=2)
    # A pass for all heads and one for each that learns, as a head without weights does in stage lora alone.
    kinds = {"joint", "detection", "segmentation"} | ({"region_text"} if stage == "lora" else set())
    assert passes == [len(IMAGES)] * len(kinds) * 3
    assert len(rounds) == 2 and set(rounds[0]) == kinds
    for row in rounds:
        for kind, figures in row.items():
            assert figures["memory"] > 0
            heads = 2 if kind in ("joint", "segmentation") else 0
            expected = {"tower": 1, "heads": heads, "other": 4, "total": 5 + heads}
            assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert any(not p.equal(b) for p, b in zip(trainer.parameters, before, strict=True))
    # Nothing is left behind.
    assert not trainer.parameters[0]._post_accumulate_grad_hooks


def test_backward_through_the_tower_is_the_towers(nap):
    trainer = trainer_of("lora")
    adapter(trainer, block=1).register_full_backward_hook(lambda *a: nap(3))
    for row in measure(trainer, IMAGES, rounds=1):
        assert [figures["tower"] for figures in row.values()] == [3, 3, 3, 3]
        assert {figures["heads"] + figures["other"] for figures in row.values()} == {0}


def test_summary_is_of_medians_and_paired_quotients():
    def row(joint: float, a: float, b: float, memory: float = 1.0) -> dict:
        parts = {"tower": 0.5, "heads": 0.3, "other": 0.2}
        return {
            kind: {"total": t, "memory": memory} | {part: share * t for part, share in parts.items()}
            for kind, t in (("joint", joint), ("a", a), ("b", b))
        }

    found = summary([row(1, 1, 2), row(10, 5, 5), row(2, 4, 4, memory=3.0)])
    assert found["speed"] == pytest.approx(3) and found["tower_speed"] == pytest.approx(3)
    assert found["kinds"]["joint"]["total"] == 2 and found["kinds"]["ratio"]["total"] == 8
    assert found["kinds"]["ratio"]["tower"] == 4 and found["kinds"]["ratio"]["memory"] == 1


def test_command(shapes_train, shapes_captions, tmp_path, capsys):
    keys = {
        "MODEL.VISFT.HEADS": "('detection', 'segmentation', 'captioning')",
        "VISFT.DATA.TRAIN_CAPTIONS": shapes_captions,
        "MODEL.VISFT.CAPTIONING.MIN_WORD_COUNT": 1,
    }
    options = ["--rounds", "2", "--images", "3", "--output", str(tmp_path / "b.json")]
    arguments = runs.option(tiny_arguments(shapes_train, None, tmp_path / "run"), *options)
    arguments += runs.words(keys)
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["images"] == [[64, 64]] * 3 and found["stage"] == "lora" and found["rounds"] == 2
    kinds = found["kinds"]
    assert list(kinds) == ["joint", "detection", "segmentation", "captioning", "ratio"]
    for kind, row in kinds.items():
        assert f"{row['total']:.3f}" in shown and f"{1 / row['total']:.3f}" in shown, kind
    assert f"{found['speed']:.2f} times as fast as 3 of ratio" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--plot", "a.png"], "--plot"),
        (["--against", "reference", "--stage", "heads"], "leave out --stage"),
        (["--against", "reference", "--plot", "a.txt"], ".svg"),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "MODEL.META_ARCHITECTURE"),
        (["MODEL.VISFT.HEADS", "('detection', 'captioning')"], "captioning"),
    ],
)
def test_what_is_refused(shapes_train, tmp_path, capsys, extra, words):
    arguments = tiny_arguments(shapes_train, None, tmp_path / "run")
    at = 2 if extra[0].startswith("--") else len(arguments)
    assert command.main([*arguments[:at], *extra, *arguments[at:]]) == 1
    assert words in capsys.readouterr().err
