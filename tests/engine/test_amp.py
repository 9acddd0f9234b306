"""Mixed precision with real models on the CPU: a step in bfloat16, evaluation in it, and what `auto` means."""

import pytest
import torch
from tiny_run import ROOT, tiny_arguments
from torch.overrides import TorchFunctionMode

from visft.data import build_stage_loader, load_labelled, register_own_data
from visft.engine import evaluate, settings, stages
from visft.engine.trainer import StageTrainer
from visft.modeling.heads import Vocabulary
from visft.utils import mixed_precision


class Linears(TorchFunctionMode):
    """Notes in which types the linear layers within it compute."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("stage", ["heads", "lora"])
def test_a_step_in_bfloat16_is_near_one_in_float32(stage, shapes_train, tmp_path):
    arguments = tiny_arguments(shapes_train, None, tmp_path / "run")
    cfg = settings.load_config(arguments[1], arguments[2:])
    register_own_data(cfg)
    found = {}
    for amp in ("", "bfloat16"):
        model = stages.initial_model(cfg, seed=3)
        model.set_stage(stage)
        if stage == "lora":  # off zero, or A would have no gradient
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    torch.nn.init.normal_(parameter, std=0.02)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        has_labels = {name: head.has_labels for name, head in model.heads.items()}
        batches = build_stage_loader(cfg, stage, load_labelled(cfg, has_labels), seed=1)
        optimizer = torch.optim.SGD(trained.values(), lr=0.01)
        trainer = StageTrainer(model, iter(batches), optimizer, stage=stage, amp=amp, seed=1)
        with Linears() as linears:
            trainer.train(0, 1)
        assert linears.dtypes == {torch.bfloat16 if amp else torch.float32}
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trained.values())
        gradient = torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])
        found[amp] = trainer.storage.latest()["total_loss"][0], gradient
    (loss, gradient), (low_loss, low_gradient) = found[""], found["bfloat16"]
    assert low_loss == pytest.approx(loss, rel=0.03) and low_loss != loss
    similarity = torch.nn.functional.cosine_similarity(gradient, low_gradient, dim=0)
    assert similarity > 0.9, similarity


@pytest.mark.parametrize(
    ("amp", "device", "has", "expected"),
    [
        ("auto", "cpu", True, ""),
        ("auto", "cuda", True, "bfloat16"),
        ("auto", "cuda", False, ""),
        ("float16", "cuda", True, "float16"),
        ("", "cuda", True, ""),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_that_has_it(amp, device, has, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    cfg = settings.load_config(None, ["MODEL.META_ARCHITECTURE", "ViSFT", "MODEL.DEVICE", device])
    cfg.MODEL.CLIP_VIT.FROZEN_DTYPE = "auto"
    for stage in ("HEADS", "LORA"):
        cfg.VISFT.SOLVER[stage].AMP = amp
        assert mixed_precision.amp_type(cfg, stage.lower()) == expected
    assert mixed_precision.frozen_type(cfg) == expected
    cfg.VISFT.SOLVER.HEADS.AMP = "float16" if amp != "float16" else ""
    assert mixed_precision.frozen_type(cfg) == ""  # stages differ
    cfg.VISFT.STAGES = ("lora",)
    assert mixed_precision.frozen_type(cfg) == expected
    cfg.MODEL.VISFT.TUNE = "full"
    assert mixed_precision.frozen_type(cfg) == ""


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("visft_*.yaml")), ids=lambda f: f.stem)
def test_our_recipes_have_auto_and_the_authors_their_float16(config):
    cfg = settings.load_config(str(config))
    expected = "float16" if config.stem.startswith("visft_eva") else "auto"
    solver = cfg.VISFT.SOLVER
    assert {solver.HEADS.AMP, solver.LORA.AMP, cfg.MODEL.CLIP_VIT.FROZEN_DTYPE} == {expected}


def test_what_amp_leaves_in_float32_is_tf32_on_a_gpu_alone():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for device, expected in (("cpu", "highest"), ("cuda", "high")):
            torch.set_float32_matmul_precision("highest")
            mixed_precision.allow_tf32(settings.load_config(None, ["MODEL.DEVICE", device]))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


HEADS = "('detection', 'segmentation', 'captioning', 'region_text')"


@pytest.mark.parametrize("heads", [HEADS, "('detection',)"], ids=["own heads", "RCNNHead"])
def test_evaluation_and_prediction_are_in_the_type_of_training(heads, shapes_train, shapes_test, tmp_path):
    arguments = tiny_arguments(shapes_train, shapes_test, tmp_path / "run")
    arguments += ["MODEL.VISFT.HEADS", heads, "VISFT.SOLVER.LORA.AMP", "bfloat16"]
    arguments += ["MODEL.CLIP_VIT.FROZEN_DTYPE", "auto", "VISFT.SOLVER.HEADS.AMP", "bfloat16"]
    if heads != HEADS:
        arguments += ["MODEL.VISFT.DETECTION.HEAD", "RCNNHead", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
        arguments += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"]
        arguments += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    cfg = settings.load_config(arguments[1], arguments[2:])
    register_own_data(cfg)
    Vocabulary(["red", "square"]).write(tmp_path / "vocabulary.json")
    cfg.MODEL.VISFT.CAPTIONING.VOCABULARY = str(tmp_path / "vocabulary.json")
    model = stages.initial_model(cfg, seed=3).eval()
    weights = [
        p for b in model.backbone.blocks for n, p in b.named_parameters() if p.ndim > 1 and "lora" not in n
    ]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    with Linears() as linears:
        figures = evaluate.evaluate(cfg, model)
        evaluate.draw(cfg, model, tmp_path / "drawn")
    assert any(name.startswith("detection/") for name in figures)
    assert torch.bfloat16 in linears.dtypes
    assert len(list((tmp_path / "drawn").glob("*.png"))) >= 4
