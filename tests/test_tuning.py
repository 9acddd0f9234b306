"""What trains in stage `lora`: LoRA, all of the tower, and the heads beside it; with which rates."""

import pytest
import torch
from demo_models import build, losses_of, picture
from detectron2.config import CfgNode

from visft.engine.optimizer import build_optimizer
from visft.errors import ConfigError

LORA_ALONE = ("VISFT.STAGES", ("lora",))
FULL = (*LORA_ALONE, "MODEL.VISFT.TUNE", "full")
ONE_STAGE = (*LORA_ALONE, "MODEL.VISFT.FREEZE_HEADS", False)


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_trains_the_tower_and_has_no_lora():
    model = build(*FULL).train()
    names = set(model.state_dict())
    assert not any("lora_" in name for name in names)
    sum(losses_of(model, [picture()]).values()).backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    # All but the projection to the embedding, which the map does not depend on.
    assert found == {n for n in names if n.startswith("backbone.tower.")} - {"backbone.tower.proj"}
    assert found == trained(model)
    assert model.backbone.training and not any(module.training for module in model.heads.modules())


def test_full_between_stages():
    model = build("MODEL.VISFT.TUNE", "full").train()
    assert model.stage == "heads" and all(name.startswith("heads.") for name in trained(model))
    model.set_stage("lora")
    assert all(name.startswith("backbone.tower.") for name in trained(model))
    model.set_stage("heads")
    assert all(name.startswith("heads.") for name in trained(model))


def test_heads_that_are_not_frozen_train_with_dropout():
    model = build(*ONE_STAGE, "MODEL.VISFT.DETECTION.DROPOUT", 0.5).train()
    assert all(module.training for module in model.heads.modules())
    first, second = (losses_of(model, [picture()], seed) for seed in (1, 2))
    assert not torch.equal(first["detection/loss_ce"], second["detection/loss_ce"])
    sum(first.values()).backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == trained(model) == {n for n in found if n.startswith("heads.") or "lora_" in n}
    assert {n for n, _ in model.heads.named_parameters(prefix="heads")} <= found
    assert not any(module.training for module in model.eval().modules())


def test_the_first_step_of_joint_training_has_the_gradients_of_each_alone():
    """LoRA's are those with frozen heads, the heads' those with a frozen tower: B = 0, and without dropout."""
    options = ("MODEL.VISFT.DETECTION.DROPOUT", 0.0)
    found = {}
    for stage, freeze in (("heads", True), ("lora", True), ("lora", False)):
        model = build(*options, "MODEL.VISFT.FREEZE_HEADS", freeze).train()
        model.set_stage(stage)
        sum(losses_of(model, [picture(), picture((40, 64), number=2)]).values()).backward()
        found[stage, freeze] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    alone = found["heads", True] | found["lora", True]
    assert alone.keys() == found["lora", False].keys()
    for name, gradient in found["lora", False].items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=1e-7, msg=name)


def solver(rate: float, decay: float) -> CfgNode:
    return CfgNode({"BASE_LR": rate, "WEIGHT_DECAY": decay})


def test_heads_have_their_own_rate_and_decay_beside_the_tower():
    model = build(*ONE_STAGE)
    optimizer = build_optimizer(model, solver(1e-3, 0.1), heads=solver(2e-4, 0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        (part,) = {names[id(p)].split(".")[0] for p in group["params"]}
        rate, decay, scale = {"heads": (2e-4, 0.3, 0.2), "backbone": (1e-3, 0.1, 1.0)}[part]
        assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == decay
        assert group.get("lr_scale", 1.0) == pytest.approx(scale)


@pytest.mark.parametrize("options", [FULL, LORA_ALONE])
def test_rates_decay_by_layer(options):
    model = build(*options)
    depth = len(model.backbone.blocks)
    optimizer = build_optimizer(model, solver(1e-3, 0.1), layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for index, block in enumerate(model.backbone.blocks):
        for parameter in block.parameters():
            if parameter.requires_grad:
                assert rates[id(parameter)] == pytest.approx(1e-3 * 0.5 ** (depth - index))
    if options is FULL:
        assert rates[id(model.backbone.tower.conv1.weight)] == pytest.approx(1e-3 * 0.5 ** (depth + 1))
        assert rates[id(model.backbone.tower.ln_post.weight)] == pytest.approx(1e-3)


def test_the_papers_recipe_has_one_group_in_the_order_of_the_parameters():
    model = build(*LORA_ALONE)
    optimizer = build_optimizer(model, solver(1e-3, 0.1), heads=solver(1e-9, 0.3))
    (group,) = optimizer.param_groups
    assert "lr_scale" not in group
    expected = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(group["params"], expected, strict=True))


def test_an_unknown_way_of_tuning_is_said():
    with pytest.raises(ConfigError, match="MODEL.VISFT.TUNE: `fulll` is unknown; the nearest is `full`"):
        build("MODEL.VISFT.TUNE", "fulll")
