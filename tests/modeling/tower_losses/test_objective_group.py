"""Objectives beside heads and alone: two processes learn what one would, and heads what they would without them."""

import functools

import pytest
import torch
import two_processes
from demo_models import losses_of, picture
from objective_models import CAPTIONS, captioned, with_objectives

from visft.errors import ConfigError
from visft.modeling.meta_arch import UNLABELLED

EVERY = ("anchor", "contrastive", "self_distillation")
BOXES = ("MODEL.VISFT.SELF_DISTILLATION.REGIONS", "boxes")
BALANCED = ("MODEL.VISFT.BALANCE_GRADIENTS", True, *BOXES)
HEADS = ("detection", "segmentation")


def said(number: int, caption: int | None, **kind) -> dict:
    """An image, with a caption where there is one."""
    image = picture(number=number, **kind)
    return image if caption is None else image | {"captions": [CAPTIONS[caption]]}


def unlabelled(number: int) -> dict:
    return said(number, None, boxes=False, masks=False)


# The images of each process.
BATCHES = {
    "everything": [[said(1, 0), said(2, 1)], [said(3, 2), said(4, 0)]],
    "captions on one": [[said(1, 0), said(2, 1), said(3, 2)], [said(4, None), said(5, None)]],
    "captions apart": [[said(1, 0), said(2, None)], [said(3, 1), said(4, 2), said(5, None)]],
    "no labels on the first": [[unlabelled(1)], [said(2, 0), said(3, 1, masks=False)]],
    "no labels": [[unlabelled(1)], [unlabelled(2)]],
    "a task": [[said(1, 0) | {"task": "segmentation"}], [said(2, 1) | {"task": "segmentation"}]],
}


def build(heads: bool):
    return with_objectives(*EVERY, options=BALANCED if heads else BOXES, heads=HEADS if heads else ())


@pytest.fixture(scope="module")
def steps() -> tuple[dict, dict]:
    return {heads: functools.partial(build, heads) for heads in (True, False)}, BATCHES


@pytest.fixture(scope="module")
def group(steps, tmp_path_factory) -> list[dict]:
    return two_processes.together(*steps, tmp_path_factory.mktemp("objectives"))


@pytest.fixture(scope="module")
def single(steps) -> dict:
    return two_processes.alone(*steps)


@pytest.mark.parametrize("way", two_processes.WAYS)
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_two_processes_learn_what_one_does_from_the_joined_batch(group, single, name, heads, way):
    losses, expected = single[heads, name]
    assert {key.split("/")[0] for key in losses} >= {"anchor"}
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    two_processes.assert_mean_losses([part[heads, name, way][0] for part in group], losses)
    for part in group:
        assert two_processes.relative(part[heads, name, way][1], expected) < 3e-6


def test_heads_learn_what_they_would_without_objectives():
    images = [said(1, 0), said(2, 1)]
    plain = losses_of(with_objectives(heads=HEADS), images)
    beside = losses_of(with_objectives(*EVERY, heads=HEADS, options=BOXES), images)
    assert {name for name in beside if name not in plain} == {f"{name}/loss" for name in EVERY}
    assert all(torch.equal(value, beside[name]) for name, value in plain.items())


def test_objectives_act_in_the_towers_stage_alone():
    model = with_objectives(*EVERY, stages=("heads", "lora"))
    assert model.stage == "heads"
    assert {name.split("/")[0] for name in losses_of(model, captioned(2))} == {"detection"}
    model.set_stage("lora")
    assert {name.split("/")[0] for name in losses_of(model, captioned(2))} == {"detection", *EVERY}


def test_without_heads():
    model = with_objectives("contrastive", heads=())
    losses = losses_of(model, captioned(3))
    assert list(losses) == ["contrastive/loss"]
    assert list(losses_of(model, [picture()])) == [UNLABELLED]
    assert model.eval()([picture()]) == [{}]
    for options in ({}, {"stages": ("heads", "lora")}):
        with pytest.raises(ConfigError, match="MODEL.VISFT.HEADS"):
            with_objectives(*(("anchor",) if options else ()), heads=(), **options)


def test_an_unknown_objective_is_said():
    with pytest.raises(ConfigError, match="`anchr` is unknown; the nearest is `anchor`"):
        with_objectives("anchr")
    with pytest.raises(ConfigError, match="OBJECTIVE: `Anchr` is unknown; the nearest is `Anchor`"):
        with_objectives("anchor", options=("MODEL.VISFT.ANCHOR.OBJECTIVE", "Anchr"))
