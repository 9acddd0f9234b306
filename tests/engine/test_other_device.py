"""Training and inference on another device than the CPU: nothing is forgotten on it, and the result is the same."""

import argparse
import functools
from pathlib import Path

import pytest
import runs
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from other_device import DEVICE, other_device, waits
from safetensors.torch import load_file
from tiny_run import tiny_arguments

from visft.checkpoint.run import RunCheckpointer, trained_tensors
from visft.data import build_stage_loader, build_test_mapper, load_labelled, register_own_data
from visft.data.datasets.catalog import OWN_TRAIN
from visft.engine import settings, stages
from visft.engine.optimizer import build_optimizer
from visft.engine.run_vocabulary import with_vocabulary
from visft.engine.trainer import StageTrainer

ALL = "('detection', 'segmentation', 'captioning')"
OBJECTIVES = "('anchor', 'contrastive', 'self_distillation')"
WITHOUT_HEADS = {"MODEL.VISFT.HEADS": "()", "VISFT.STAGES": "('lora',)"}
SIGMOID = {
    f"MODEL.VISFT.{head}.{key}": value
    for head in ("DETECTION", "SEGMENTATION")
    for key, value in {"CLASS_LOSS": "sigmoid", "FED_LOSS_CLASSES": 2}.items()
}
RCNN = {
    "MODEL.VISFT.HEADS": "('detection',)",
    "MODEL.VISFT.DETECTION.HEAD": "RCNNHead",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
}
WINDOWS = {
    "MODEL.CLIP_VIT.WINDOW_SIZE": 3,
    "MODEL.CLIP_VIT.CLASS_TOKEN": "drop",
    "MODEL.CLIP_VIT.ACTIVATION_CHECKPOINTING": True,
    "MODEL.CLIP_VIT.LAYER_DECAY": 0.8,
}
CASES = {
    "heads": ("heads", {"MODEL.VISFT.HEADS": ALL}),
    "heads, federated": ("heads", SIGMOID),
    "heads, transformer": (
        "heads",
        {"MODEL.VISFT.HEADS": "('captioning',)", "MODEL.VISFT.CAPTIONING.HEAD": "TransformerCaptionHead"},
    ),
    "heads, R-CNN": ("heads", RCNN),
    "lora": (
        "lora",
        {"MODEL.VISFT.HEADS": ALL, "MODEL.LORA.TARGETS": "('q', 'k', 'v', 'proj', 'fc1', 'fc2')"},
    ),
    "lora, balanced": ("lora", {"MODEL.VISFT.BALANCE_GRADIENTS": True}),
    "lora, in turn": ("lora", {"MODEL.VISFT.HEADS": ALL, "VISFT.TASK_MIXING": "ratio"}),
    "lora, windows": ("lora", WINDOWS),
    "lora, offloaded": (
        "lora",
        {f"MODEL.CLIP_VIT.{key}": True for key in ("ACTIVATION_CHECKPOINTING", "OFFLOAD_ACTIVATIONS")},
    ),
    "lora, frozen bfloat16": ("lora", {"MODEL.CLIP_VIT.FROZEN_DTYPE": "bfloat16"}),
    "lora, objectives": ("lora", WITHOUT_HEADS | {"MODEL.VISFT.OBJECTIVES": OBJECTIVES}),
    "lora, regions": (
        "lora",
        WITHOUT_HEADS
        | {
            "MODEL.VISFT.OBJECTIVES": "('anchor', 'self_distillation')",
            "MODEL.VISFT.SELF_DISTILLATION.REGIONS": "boxes",
            "MODEL.VISFT.ANCHOR.CROPS": 1,
        },
    ),
    "full": ("lora", {"MODEL.VISFT.TUNE": "full"}),
    "one stage": ("lora", {"MODEL.VISFT.FREEZE_HEADS": False}),
}


@pytest.fixture
def trained(shapes_train, shapes_captions, tmp_path):
    """`trained(device, stage, keys)` trains for two iterations; see `_trained`."""
    return functools.partial(_trained, shapes_train, shapes_captions, tmp_path)


def _trained(train, captions, folder: Path, device: str, stage: str, keys: dict):
    """The losses by iteration, the model, its optimizer, its config, and what the trained tensors were before."""
    keys = {"VISFT.DATA.TRAIN_CAPTIONS": captions, "MODEL.VISFT.CAPTIONING.MIN_WORD_COUNT": 1} | keys
    words = [*tiny_arguments(train, None, folder), *runs.words(keys | {"MODEL.DEVICE": device})]
    cfg = settings.load_config(words[1], words[2:])
    register_own_data(cfg)
    cfg = with_vocabulary(cfg, folder)
    DatasetCatalog.get(OWN_TRAIN)  # fills its metadata
    meta = MetadataCatalog.get(OWN_TRAIN)
    meta.class_image_count = [{"id": i, "image_count": 2 + i} for i in meta.thing_dataset_id_to_contiguous_id]
    model = stages.initial_model(cfg, seed=3)
    model.set_stage(stage)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):  # off zero, or A would have no gradient
            with torch.no_grad():
                parameter.copy_(torch.full(parameter.shape, 0.01))
    solver = cfg.VISFT.SOLVER[stage.upper()]
    decay = cfg.MODEL.CLIP_VIT.LAYER_DECAY
    optimizer = build_optimizer(model, solver, layer_decay=decay, heads=cfg.VISFT.SOLVER.HEADS)
    parts = [*model.heads.items(), *model.objectives.items()]
    images = load_labelled(cfg, {name: part.has_labels for name, part in parts})
    batches = build_stage_loader(cfg, stage, images, seed=1)
    trainer = StageTrainer(model, iter(batches), optimizer, stage=stage, clip_norm=solver.CLIP_NORM, seed=1)
    start = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    trainer.train(0, 2)
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    return losses, model, optimizer, cfg, start


def found(model, cfg) -> list[dict]:
    """What the heads find in two images."""
    mapper = build_test_mapper(cfg)
    images = [mapper(dict(record)) for record in DatasetCatalog.get(OWN_TRAIN)[:2]]
    return model.eval()(images) if cfg.MODEL.VISFT.HEADS else []


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_as_on_the_cpu(case, trained):
    losses, model, _, cfg, start = trained("cpu", *CASES[case])
    expected = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    outputs = found(model, cfg)
    with other_device():
        there, model, _, cfg, _ = trained(DEVICE.type, *CASES[case])
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.device.type == DEVICE.type for tensor in tensors)
        moved = {name: tensor.cpu() for name, tensor in trained_tensors(model).items()}
        assert [set(output) for output in found(model, cfg)] == [set(output) for output in outputs]
    assert there == pytest.approx(losses, rel=1e-4)
    assert moved.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        if "bfloat16" in case:
            # Adam's first steps have the length of the rate, whichever way a gradient near zero is rounded.
            assert (moved[name] - tensor).norm() < 0.3 * (tensor - start[name]).norm(), name
        else:
            torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "heads_that_match"),
    [("heads", 2), ("heads, transformer", 0), ("lora", 2), ("lora, balanced", 2), ("lora, objectives", 0)],
)
def test_a_step_waits_for_the_device_once_and_once_for_each_matching(
    case, heads_that_match, trained, monkeypatch
):
    """However large the batch is: the losses and the norm come together, and scipy assigns on the host."""
    stage, keys = CASES[case]
    run_step, found = StageTrainer.run_step, []

    def noted(trainer: StageTrainer) -> None:
        waits.clear()
        run_step(trainer)
        found.append(list(waits))

    monkeypatch.setattr(StageTrainer, "run_step", noted)
    for size in (1, 3):
        with other_device():
            trained(DEVICE.type, stage, keys | {f"VISFT.SOLVER.{stage.upper()}.IMS_PER_BATCH": size})
    assert len(found) == 4
    for step in found:
        assert sum("matcher.py" in wait for wait in step) == heads_that_match
        assert len(step) == heads_that_match + 1, step


def test_a_checkpoint_goes_back_to_the_device(trained, tmp_path):
    with other_device():
        _, model, optimizer, *_ = trained(DEVICE.type, "lora", {})
        saved = {name: tensor.cpu() for name, tensor in trained_tensors(model).items()}
        moments = [state["exp_avg"].cpu() for state in optimizer.state.values()]
        RunCheckpointer(tmp_path, model, optimizer, stage="lora").save(2)
        with torch.no_grad():
            for tensor in trained_tensors(model).values():
                tensor.zero_()
        assert RunCheckpointer(tmp_path, model, optimizer, stage="lora").resume() == 2
        for name, tensor in trained_tensors(model).items():
            assert tensor.device.type == DEVICE.type and torch.equal(tensor.cpu(), saved[name])
        for state, moment in zip(optimizer.state.values(), moments, strict=True):
            assert state["exp_avg"].device.type == DEVICE.type and torch.equal(state["exp_avg"].cpu(), moment)


def test_a_whole_run_ends_as_on_the_cpu(shapes_train, shapes_test, tmp_path, in_process):
    """With cached features, evaluations, images and export."""
    keys = {
        "VISFT.EXPORT": "('open_clip',)",
        "VISFT.FEATURE_CACHE": 0.1,
        "VISFT.SOLVER.HEADS.MAX_ITER": 2,
        "VISFT.SOLVER.LORA.MAX_ITER": 2,
        "VISFT.SOLVER.LORA.EVAL_PERIOD": 1,
        "SEED": 3,
    }

    def run(device: str) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
        folder = tmp_path / device
        words = [*tiny_arguments(shapes_train, shapes_test, folder), *runs.words(keys)]
        cfg = settings.load_config(words[1], [*words[2:], "MODEL.DEVICE", device])
        register_own_data(cfg)
        figures = stages.run(cfg, argparse.Namespace(resume=False))
        assert len(list((folder / "predictions").glob("*.png"))) == 4
        return figures, load_file(folder / "export" / "visft_backbone.safetensors")

    expected, tower = run("cpu")
    with other_device() as device:
        found, tower_there = run(device.type)
    assert found.keys() == expected.keys() == {"heads", "lora"}
    for step, figures in expected.items():
        assert "detection/bbox/AP" in figures and "segmentation/segm/AP" in figures
        assert found[step] == pytest.approx(figures, abs=0.1, nan_ok=True)
    assert tower.keys() == tower_there.keys()
    for name, tensor in tower.items():
        torch.testing.assert_close(tower_there[name], tensor, rtol=1e-3, atol=1e-4)


def test_what_a_gpu_refuses_is_refused():
    """Else the tests above would show nothing."""
    with other_device() as device:
        there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
        for mixed in (
            lambda: there + here,
            lambda: torch.cat((there, here)),
            lambda: torch.nn.functional.linear(there, here),
            lambda: torch.stack((there.sum(), here.sum())),
            lambda: here[torch.zeros(2, dtype=torch.int64, device=device)],
        ):
            with pytest.raises(RuntimeError, match="on one device"):
                mixed()
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
        # Numbers and indices may come from the CPU.
        assert (there * torch.tensor(2.0))[torch.tensor([1])].sum().item() == 6
        there[:, 0] = 5
        assert there.cpu().tolist() == [[5, 1, 1], [5, 1, 1]]
