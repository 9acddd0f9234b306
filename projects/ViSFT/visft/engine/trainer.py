"""The training loop of one stage: detectron2's TrainerBase, with what the recipe and exact resuming ask for."""

import contextlib
import hashlib
import random
import time
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from visft import progress
from visft.engine.hooks import Writers
from visft.engine.optim import average_gradients
from visft.errors import TrainingError

_AMP = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seed_iteration(seed: int, stage: str, iteration: int) -> None:
    """Seed every global generator for one iteration, alike in all processes.

    What an iteration draws (dropout, sampled points) then depends on its number alone. A run that was killed
    continues as if it had not been, whatever ran in between. Sampled points are those of one process with the joined
    batch (they also depend on the picture), so that the number of processes changes nothing but dropout.
    """
    text = f"{seed} {stage} {iteration}".encode()
    value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


class StageTrainer(TrainerBase):
    """Trains what `requires_grad` in a model, with gradient accumulation, clipping and automatic mixed precision.

    Args:
        model: maps a batch (list of image dicts) to a dict of scalar losses.
        batches: endless iterator of batches, positioned at the first iteration to run.
        optimizer: over the trained parameters.
        stage: its name, for seeds and messages.
        accumulate: batches a step; their gradients are averaged.
        clip_norm: L2 norm that the gradient is clipped to; 0: not clipped.
        amp: "", "bfloat16" or "float16" (CUDA; the loss is scaled).
        seed: of everything that an iteration draws.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterator[list[dict]],
        optimizer: torch.optim.Optimizer,
        *,
        stage: str,
        accumulate: int = 1,
        clip_norm: float = 0.0,
        amp: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.batches, self.optimizer = model, batches, optimizer
        self.stage, self.accumulate, self.clip_norm, self.seed = stage, accumulate, clip_norm, seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.dtype = _AMP[amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "float16")
        model.train()

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations `start_iter` to `max_iter - 1`.

        Unlike detectron2's, an error goes up without being logged as a traceback first, and the hooks that act
        after training (evaluation) do so only after one that ended well.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        shown = progress.bar(f"stage {self.stage}", max_iter, done=start_iter)
        with EventStorage(start_iter) as self.storage, shown as bar:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    bar.update()
            except BaseException:
                for hook in self._hooks:
                    if isinstance(hook, Writers):
                        hook.close()
                raise
            self.iter = max_iter
            self.after_train()

    def run_step(self) -> None:
        """One optimizer step.

        Raises:
            TrainingError: if a loss or the gradient is not finite; the weights are then as before the step.
        """
        seed_iteration(self.seed, self.stage, self.iter)
        metrics: dict[str, float] = {}
        images: list[dict] = []
        data_time = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            start = time.perf_counter()
            batch = next(self.batches)
            data_time += time.perf_counter() - start
            images += batch
            with self._autocast():
                losses = self.model(batch)
            values = _values(losses)
            self._require_finite(values, images)
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + value / self.accumulate
            total = sum(losses.values())
            if total.requires_grad:
                self.scaler.scale(total / self.accumulate).backward()
        average_gradients(self.parameters)
        if any(parameter.grad is not None for parameter in self.parameters):
            self._step(images)
        self._log(metrics, data_time)

    def _step(self, images: list[dict]) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = self.clip_norm if self.clip_norm > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not np.isfinite(norm) and not self.scaler.is_enabled():
            raise self._error("the gradient's norm", norm, images)
        self.storage.put_scalar("grad_norm", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _require_finite(self, values: dict[str, float], images: list[dict]) -> None:
        broken = [name for name, value in values.items() if not np.isfinite(value)]
        # Every process has to stop, or the others would wait for this one's gradients.
        if sum(comm.all_gather(len(broken))) if comm.get_world_size() > 1 else broken:
            if broken:
                raise self._error(f"the loss {broken[0]}", values[broken[0]], images)
            raise TrainingError(f"stage {self.stage}, iteration {self.iter}: another process stopped")

    def _error(self, what: str, value: float, images: list[dict]) -> TrainingError:
        names = ", ".join(str(image.get("file_name", image.get("image_id", "?"))) for image in images)
        return TrainingError(
            f"stage {self.stage}, iteration {self.iter}: {what} is {value}; the batch was {names}; nothing of this "
            'iteration is saved (a lower BASE_LR, AMP "" or cleaning these pictures\' labels may help, --resume '
            "goes on from the last checkpoint)"
        )

    def _log(self, metrics: dict[str, float], data_time: float) -> None:
        gathered = comm.gather((metrics, data_time))
        if not comm.is_main_process():
            return
        rows = [row for row, _ in gathered]
        names = list(dict.fromkeys(name for row in rows for name in row))
        mean = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
        # The slowest process decides how long all wait for data.
        self.storage.put_scalar("data_time", max(seconds for _, seconds in gathered))
        if mean:
            self.storage.put_scalar("total_loss", sum(mean.values()))
            self.storage.put_scalars(**mean)


def _values(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """All losses as numbers, in one transfer from the device."""
    return dict(
        zip(losses, torch.stack([loss.detach().float() for loss in losses.values()]).tolist(), strict=True)
    )
