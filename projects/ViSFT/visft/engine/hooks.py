"""Hooks of a stage: learning rate, checkpoints, and writers of metrics."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter

from visft.engine import stopping
from visft.engine.optimizer import set_learning_rate
from visft.errors import TrainingError
from visft.utils import progress


class LearningRate(HookBase):
    """Sets the learning rate before each step, from the iteration's number alone.

    Args:
        rate: maps an iteration (from 0) to its learning rate.
    """

    def __init__(self, rate: Callable[[int], float]) -> None:
        self._rate = rate

    def before_step(self) -> None:
        value = self._rate(self.trainer.iter)
        set_learning_rate(self.trainer.optimizer, value)
        self.trainer.storage.put_scalar("lr", value, smoothing_hint=False)


class Checkpoints(HookBase):
    """Saves at each multiple of the periods and after the last iteration, and when the run is asked to stop.

    Args:
        save: called with the number of iterations done, in every process.
        periods: of checkpoints, and of what may be interrupted after one (evaluation). 0: never.

    Raises:
        TrainingError: a weight is not finite; nothing is saved then.
        Stopped: after the checkpoint, when a process was sent a signal.
    """

    def __init__(self, save: Callable[[int], None], *periods: int) -> None:
        self._save, self._periods = save, [period for period in periods if period > 0]

    def after_step(self) -> None:
        done, end = self.trainer.iter + 1, self.trainer.max_iter
        stop = stopping.requested()
        if stop or done == end or any(done % period == 0 for period in self._periods):
            # A finite gradient can still end in weights that are not, with a rate that is far too high.
            if not all(torch.isfinite(parameter).all() for parameter in self.trainer.parameters):
                raise TrainingError(
                    f"stage {self.trainer.stage}, iteration {self.trainer.iter}: a trained weight is not finite, so "
                    "nothing is saved; lower BASE_LR"
                )
            self._save(done)
        if stop:
            raise stopping.stopped(stop, f"stage {self.trainer.stage} stops after iteration {done} of {end}")


class Progress(HookBase):
    """A bar over a stock trainer's iterations (see `visft.utils.progress`)."""

    def before_train(self) -> None:
        self._open = contextlib.ExitStack()
        bar = progress.bar("training", self.trainer.max_iter, done=self.trainer.start_iter)
        self._bar = self._open.enter_context(bar)

    def after_step(self) -> None:
        self._bar.update()

    def after_train(self) -> None:
        self._open.close()


class Writers(HookBase):
    """Writes metrics (progress line, metrics.json, TensorBoard) every `period` iterations and at the end."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        self._writers, self._period = list(writers), period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self._write()

    def after_train(self) -> None:
        self.trainer.storage.iter = self.trainer.iter
        self._write()
        self.close()

    def close(self) -> None:
        """Close the files; what was not written is lost, as after a kill."""
        for writer in self._writers:
            writer.close()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()
