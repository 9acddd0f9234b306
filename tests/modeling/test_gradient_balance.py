"""Balanced gradients: the heads pull at the features with one norm. (In two processes: test_distributed.py.)"""

import pytest
import torch
from batches_of_processes import BOTH, BOXES, MASKS, build, picture
from two_processes import step

from visft.modeling.gradient_balance import balanced_copies

WEIGHTS = {"detection": 1.0, "segmentation": 0.5, "region_text": 2.0}
"""The loss weights of `build`'s heads."""

IMAGES = [picture((2, BOTH), 1), picture((3, BOTH), 2), picture((1, BOXES), 3)]


def pulls(model, images) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.nn.Parameter]]:
    """The features, the gradient of each head's losses on them, and what trains; by autograd, without any balance."""
    seen = []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.manual_seed(5)
    losses = model(images)
    handle.remove()
    (features,) = seen[0].values()
    sums = {
        head: sum(value for name, value in losses.items() if name.startswith(f"{head}/")) for head in WEIGHTS
    }
    found = {head: torch.autograd.grad(s, features, retain_graph=True)[0] for head, s in sums.items()}
    return features, found, [p for p in model.parameters() if p.requires_grad]


def test_gradients_are_those_of_heads_with_equal_norms():
    """Loss weights are the ratio of the norms then; the sum goes into LoRA."""
    features, found, parameters = pulls(build("lora"), IMAGES)
    norms = {head: float(g.double().norm()) / WEIGHTS[head] for head, g in found.items()}
    assert max(norms.values()) > 1.5 * min(norms.values())  # else there is nothing to balance
    mean = sum(norms.values()) / len(norms)
    total = sum(g * (mean / norms[head]) for head, g in found.items())
    expected = torch.autograd.grad(features, parameters, total)

    _, balanced = step(build("lora balanced"), IMAGES)
    for gradient, wanted in zip(balanced.values(), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7 + 1e-5 * float(wanted.abs().max()))


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(first.values(), second.values(), strict=True))


def test_losses_are_reported_as_they_are_and_the_gradients_have_the_same_bits_each_time():
    losses, found = step(build("lora balanced"), IMAGES)
    assert step(build("lora"), IMAGES)[0] == losses
    assert equal(step(build("lora balanced"), IMAGES)[1], found)


def test_one_head_with_labels_is_left_as_it_is():
    images = [picture((1, MASKS), 3), picture((2, MASKS), 4)]
    assert equal(step(build("lora"), images)[1], step(build("lora balanced"), images)[1])


def test_stage_heads_is_left_as_it_is():
    balanced = build("heads")
    balanced.balance_gradients = True
    assert equal(step(build("heads"), IMAGES)[1], step(balanced, IMAGES)[1])


def test_the_scale_of_a_loss_does_not_matter():
    """As when the loss is scaled for float16, or one head's losses are in another unit."""
    found = []
    for scale in (1.0, 1000.0):
        features = torch.linspace(-1, 1, 24).view(1, 2, 3, 4).requires_grad_()
        copies = balanced_copies(features, {"a": 1.0, "b": 3.0})
        (copies["a"].square().sum() + scale * copies["b"].sin().sum() * 3.0).backward()
        found.append(features.grad / features.grad.norm())
    torch.testing.assert_close(*found)


def test_no_gradient_or_one_that_is_not_finite():
    features = torch.ones(1, 2, 3, 4, requires_grad=True)
    copies = balanced_copies(features, {"a": 1.0, "b": 1.0, "c": 0.0})
    (copies["a"].sum() + 0 * copies["b"].sum() + 0 * copies["c"].sum()).backward()
    assert features.grad.equal(torch.ones_like(features))
    features = torch.ones(1, 2, 3, 4, requires_grad=True)
    copies = balanced_copies(features, {"a": 1.0, "b": 1.0})
    (copies["a"].sum() + (copies["b"] * float("inf")).sum()).backward()
    # Loss scaling and the trainer's check of the gradient's norm have to see it.
    assert not torch.isfinite(features.grad).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    features = torch.full((1, 8, 32, 32), 0.5, dtype=dtype, requires_grad=True)
    copies = balanced_copies(features, {"a": 1.0, "b": 1.0})
    (200 * copies["a"].float().sum() + copies["b"].float().sum()).backward()  # squares would overflow float16
    assert features.grad.dtype == dtype
    torch.testing.assert_close(
        features.grad.float(), torch.full_like(features.grad, 201).float(), rtol=0.01, atol=0
    )
