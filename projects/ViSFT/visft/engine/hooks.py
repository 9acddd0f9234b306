"""Hooks of a stage: learning rate, checkpoints, and writers of metrics."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from visft.checkpoint.shards import local
from visft.engine import stopping
from visft.engine.optimizer import set_learning_rate
from visft.errors import TrainingError
from visft.utils import progress


class LearningRate(HookBase):
    """Sets the learning rate before each step as a function of the iteration alone.

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
    """Saves at each multiple of the periods, after the last iteration, and when a signal stops the run.

    Args:
        save: called in every process with the number of finished iterations.
        periods: of checkpoints, and of work that may be interrupted after a checkpoint (evaluation). 0: never.

    Raises:
        TrainingError: a weight is not finite. Nothing is saved then.
        Stopped: after the checkpoint, if a process received a signal.
    """

    def __init__(self, save: Callable[[int], None], *periods: int) -> None:
        self._save, self._periods = save, [period for period in periods if period > 0]

    def after_step(self) -> None:
        done, end = self.trainer.iter + 1, self.trainer.max_iter
        stop = stopping.requested()
        if stop or done == end or any(done % period == 0 for period in self._periods):
            # With a learning rate that is far too high, a finite gradient can still give infinite weights.
            if not all(comm.all_gather(all(torch.isfinite(local(p)).all() for p in self.trainer.parameters))):
                raise TrainingError(
                    f"stage {self.trainer.stage}, iteration {self.trainer.iter}: a trained weight is not finite, so "
                    "nothing is saved; lower BASE_LR"
                )
            self._save(done)
        if stop:
            raise stopping.stopped(stop, f"stage {self.trainer.stage} stops after iteration {done} of {end}")


class Progress(HookBase):
    """A progress bar for a stock trainer (see `visft.utils.progress`)."""

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
        """Close the files without writing the pending metrics."""
        for writer in self._writers:
            writer.close()

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()
