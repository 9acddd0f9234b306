"""Settings of a pretraining: length, rates, and image sizes over time."""

import math
from dataclasses import dataclass, field

from demoworld.errors import DemoWorldError


@dataclass(frozen=True)
class Phase:
    """A part of a schedule: its end (share of the whole), image size (pixels), and share of dropped patches."""

    until: float
    size: int
    patch_dropout: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run.

    Args:
        samples: length of the schedule in images. 0 if `minutes` is given.
        minutes: length of the schedule in minutes, with evaluations. The schedule then follows the clock, whose time
            the checkpoint keeps. A run by samples can instead be repeated to the bit, however often it is interrupted.
        batch_size: number of distinct emoji in a batch.
        lr: peak learning rate of AdamW, and of Muon, whose updates are scaled to the usual size of AdamW's.
        weight_decay: decoupled, and only for matrices of the two transformers.
        warmup: share of the schedule with a rising learning rate.
        average: decay per step of the running mean of the weights. This mean is shipped.
        phases: image sizes over the schedule.
        seed: of the initial weights and of all data.
        classes: number of emoji to use, from the first (0: all). For tests.
    """

    samples: int = 0
    minutes: float = 0.0
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.03
    average: float = 0.98
    phases: tuple[Phase, ...] = field(
        default=(Phase(0.55, 32), Phase(0.75, 48), Phase(0.92, 64, 0.5), Phase(1.0, 64)),
    )
    seed: int = 0
    classes: int = 0

    def __post_init__(self) -> None:
        if (self.samples > 0) == (self.minutes > 0):
            raise DemoWorldError("give the length of the pretraining either in samples or in minutes")
        if any(phase.size % 8 for phase in self.phases) or self.phases[-1].until != 1.0:
            raise DemoWorldError(
                "the image sizes of the phases must be multiples of 8, and the last phase end at 1.0"
            )

    def phase(self, progress: float) -> Phase:
        return next((p for p in self.phases if progress < p.until), self.phases[-1])

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate after a share of the schedule: linear warm-up, then half a cosine to 0."""
        if progress < self.warmup:
            return self.lr * (progress + 1e-3) / (self.warmup + 1e-3)
        return (
            self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))
        )
