"""How readouts that are small networks are trained: those of vqa, captioning and ocr in both suites."""

from collections.abc import Callable

import torch
from torch import nn


def train(
    model: nn.Module,
    loss: Callable[[torch.Tensor, int], torch.Tensor],
    count: int,
    *,
    epochs: int,
    batch: int,
    rate: float,
    weight_decay: float,
    rise: float = 0.1,
    clip: float | None = None,
    quality: Callable[[], float] | None = None,
) -> None:
    """Train a model in place by AdamW, with a learning rate that rises once and falls once (arXiv:1708.07120).

    Args:
        loss: from numbers of training examples `[n]`, n <= batch, and the epoch's number to the model's loss on them.
        count: of training examples; each is taken once an epoch, in random order.
        rate: the peak of the learning rate. rise: the share of all steps before it.
        clip: the largest norm of the gradient; None: any.
        quality: the model's on a validation split; called after every epoch without gradients, in evaluation mode. The
            weights of the best epoch are kept, of equals the first: how long to train is what regularises. None: those
            of the last epoch are.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay, fused=True)
    steps = epochs * -(-count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=rise)
    best, highest = None, -float("inf")
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(count).split(batch):
            value = loss(rows, epoch)
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
        model.eval()
        if quality is not None:
            with torch.no_grad():
                reached = quality()
            if reached > highest:
                best, highest = {name: value.clone() for name, value in model.state_dict().items()}, reached
    if quality is not None:
        model.load_state_dict(best)
