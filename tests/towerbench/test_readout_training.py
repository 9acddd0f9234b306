"""How readouts that are small networks are trained."""

import pytest
import torch
from torch import nn

from towerbench import readout_training

HOW = {"batch": 5, "rate": 0.1, "weight_decay": 0.0}


def line() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A model, and numbers `[23, 1]` with what it should make of them."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 23)[:, None]
    return nn.Linear(1, 1), x, 3 * x - 1


def test_every_example_is_taken_once_an_epoch_and_the_model_learns():
    model, x, y = line()
    taken: dict[int, list[int]] = {}

    def loss(rows: torch.Tensor, epoch: int) -> torch.Tensor:
        assert len(rows) <= 5 and model.training
        taken.setdefault(epoch, []).extend(rows.tolist())
        return (model(x[rows]) - y[rows]).square().mean()

    readout_training.train(model, loss, len(x), epochs=60, **HOW)
    assert list(taken) == list(range(60)) and all(sorted(rows) == list(range(23)) for rows in taken.values())
    assert taken[0] != taken[1]
    assert model.weight.item() == pytest.approx(3, abs=0.01) and model.bias.item() == pytest.approx(
        -1, abs=0.01
    )


def test_the_first_of_the_best_epochs_is_kept():
    model, x, y = line()
    qualities, weights = [0.2, 0.7, 0.5, 0.7, 0.1], []

    def quality() -> float:
        assert not model.training and not torch.is_grad_enabled()
        weights.append(model.weight.item())
        return qualities[len(weights) - 1]

    readout_training.train(
        model,
        lambda rows, epoch: (model(x[rows]) - y[rows]).square().mean(),
        len(x),
        epochs=5,
        quality=quality,
        **HOW,
    )
    assert len(set(weights)) == 5 and model.weight.item() == weights[1]


def test_a_gradient_is_cut_to_its_largest_norm():
    model, x, y = line()
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        for clip in (None, 0.5):
            readout_training.train(
                model,
                lambda rows, epoch: 100 * (model(x[rows]) - y[rows]).square().mean(),
                len(x),
                epochs=1,
                clip=clip,
                **HOW,
            )
    assert max(norms[:5]) > 10 and max(norms[5:]) <= 0.5 + 1e-5
