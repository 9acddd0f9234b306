"""The reference recipe computes what ours does, and the benchmark compares the two."""

import json
import multiprocessing

import processes
import pytest
import runs
import torch
from reference_recipe import as_reference
from tiny_run import tiny_arguments

from visft.applications import against_reference, reference_report, speed
from visft.commands import benchmark as command
from visft.engine.trainer import seeded_iteration
from visft.errors import ConfigError


@pytest.fixture
def _forked(monkeypatch):
    """The command's processes need not import everything themselves."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: processes.context)


@pytest.fixture
def arguments(shapes_train, shapes_captions, tmp_path) -> list[str]:
    """Of the tool, on three heads and LoRA in q and v."""
    keys = {
        "MODEL.VISFT.HEADS": "('detection', 'segmentation', 'captioning')",
        "VISFT.DATA.TRAIN_CAPTIONS": shapes_captions,
        "MODEL.VISFT.CAPTIONING.MIN_WORD_COUNT": 1,
        "MODEL.LORA.DROPOUT": 0.0,
    }
    options = ["--against", "reference", "--rounds", "1", "--images", "3"]
    return runs.option(tiny_arguments(shapes_train, None, tmp_path / "run"), *options) + runs.words(keys)


def model_and_images(arguments: list[str], *more: str):
    parsed = command.parse([*arguments, *more])
    torch.manual_seed(0)
    model, loader = speed.build(speed.checked_config(parsed), "lora", 3)
    against_reference._move_lora(model.backbone)
    return model.train(), next(loader)


def step(model, images: list[dict]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, and gradients of LoRA."""
    model.zero_grad()
    with seeded_iteration(0, "lora", 0):
        losses = model(images)
    sum(losses.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("class_token", ["keep", "drop"])
def test_same_losses_and_gradients(arguments, class_token, checkpointing):
    """Ours for all tasks at once, the reference task by task; images of two sizes, so that one is padded."""
    model, images = model_and_images(arguments, "MODEL.CLIP_VIT.CLASS_TOKEN", class_token)
    images[0]["image"] = images[0]["image"][:, :56, :40]
    images[0]["instances"] = cropped(images[0]["instances"], 56, 40)
    losses, gradients = step(model, images)
    as_reference(model).backbone.activation_checkpointing = checkpointing
    total = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    found = {}
    for task in model.heads:
        part, its_gradients = step(model, [image | {"task": task} for image in images])
        assert {name.split("/")[0] for name in part} == {task}
        found |= part
        for name, gradient in its_gradients.items():
            total[name] += gradient
    assert found.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-6, msg=name)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (total[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def cropped(instances, height: int, width: int):
    """The objects within a part of their image."""
    from detectron2.structures import BitMasks, Instances

    part = Instances((height, width), gt_classes=instances.gt_classes, gt_boxes=instances.gt_boxes.clone())
    part.gt_boxes.clip((height, width))
    part.gt_masks = BitMasks(instances.gt_masks.tensor[:, :height, :width])
    return part[part.gt_boxes.nonempty()]


@pytest.mark.usefixtures("_forked")
def test_command(arguments, tmp_path, capsys):
    output = tmp_path / "b.json"
    assert command.main(runs.option(arguments, "--output", str(output))) == 0
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["images"] == [[64, 64]] * 3 and found["rounds"] == 1
    assert found["loss_difference"] < 1e-4
    heads = ("detection", "segmentation", "captioning")
    assert {part: tuple(ways) for part, ways in found["parts"].items()} == reference_report.parts(heads)
    for ways in found["parts"].values():
        for figures in ways.values():
            assert 0 < figures["seconds"]["median"] < 60 and figures["memory"] > 0.1
            assert f"{figures['seconds']['median']:.3g} s" in shown
    for name, ratio in found["ratios"].items():
        assert f"| {name} | {ratio['median']:.2f} (" in shown
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["MODEL.LORA.TARGETS", "('q', 'fc1')"], "MODEL.LORA.TARGETS"),
        (["MODEL.CLIP_VIT.WINDOW_SIZE", "4"], "WINDOW_SIZE 0"),
        (["MODEL.VISFT.DETECTION.CLASS_LOSS", "sigmoid"], "CLASS_LOSS softmax"),
        (["MODEL.VISFT.OBJECTIVES", "('anchor',)"], "MODEL.VISFT.OBJECTIVES"),
    ],
)
def test_what_the_reference_is_not(arguments, keys, words):
    model, _ = model_and_images(arguments, *keys)
    with pytest.raises(ConfigError, match=words.replace("(", "\\(")):
        as_reference(model)


@pytest.mark.usefixtures("_forked")
def test_an_error_of_a_process_is_the_commands(arguments, capsys):
    assert command.main([*arguments, "MODEL.LORA.TARGETS", "('q', 'fc1')"]) == 1
    assert "error: the reference recipe has LoRA in q, k or v" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def test_outside_of_a_checkout(arguments, tmp_path, monkeypatch, capsys):
    package = tmp_path / "site-packages" / "visft"
    monkeypatch.setattr(against_reference.visft, "__file__", str(package / "__init__.py"))
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert "tests/reference" in error and "checkout" in error
