"""Automatic mixed precision with a real model on the CPU: a step in bfloat16 is finite and near one in float32."""

import pytest
import torch
from tiny_run import tiny_arguments
from torch.overrides import TorchFunctionMode

from visft.data import build_stage_loader, load_labelled, register_own_data
from visft.engine import settings, stages
from visft.engine.trainer import StageTrainer


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
