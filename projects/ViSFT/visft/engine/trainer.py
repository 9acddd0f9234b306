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

from visft.engine import stopping
from visft.engine.hooks import Writers
from visft.engine.optimizer import average_gradients
from visft.errors import TrainingError
from visft.utils import mixed_precision, progress, shared_random


def seed_iteration(seed: int, stage: str, iteration: int, rank: int = 0) -> None:
    """Seed every global generator for one iteration.

    What an iteration draws then depends on its number and the process alone. A run that was killed continues as if it
    had not been, whatever ran in between.
    """
    value = _seed_of(seed, stage, iteration, *([rank] if rank else []))
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


def _seed_of(*words: object) -> int:
    text = " ".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@contextlib.contextmanager
def seeded_iteration(seed: int, stage: str, iteration: int) -> Iterator[None]:
    """Draws of one iteration: dropout of this process's own; sampled points and the like shared.

    Shared draws are those of one process with the joined batch (they also depend on the image), so that the number of
    processes changes nothing but dropout.
    """
    seed_iteration(seed, stage, iteration, comm.get_rank())
    with shared_random.seeded(_seed_of(seed, stage, iteration) % 2**63):
        yield


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
        self.amp = amp
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
                with stopping.held():
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
        with seeded_iteration(self.seed, self.stage, self.iter):
            self._run_step()

    def _run_step(self) -> None:
        passes: list[tuple[list[dict], dict[str, torch.Tensor]]] = []
        data_time = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            start = time.perf_counter()
            batch = next(self.batches)
            data_time += time.perf_counter() - start
            with mixed_precision.autocast(self.device, self.amp):
                losses = self.model(batch)
            passes.append((batch, {name: loss.detach() for name, loss in losses.items()}))
            total = sum(losses.values())
            if total.requires_grad:
                self.scaler.scale(total / self.accumulate).backward()
        average_gradients(self.parameters)
        norm = self._clip()
        metrics = self._read(passes, norm)
        if norm is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._log(metrics, data_time)

    def _clip(self) -> torch.Tensor | None:
        """Clip the gradient; its norm before, None if there is no gradient."""
        if all(parameter.grad is None for parameter in self.parameters):
            return None
        self.scaler.unscale_(self.optimizer)
        limit = self.clip_norm if self.clip_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def _read(
        self, passes: list[tuple[list[dict], dict[str, torch.Tensor]]], norm: torch.Tensor | None
    ) -> dict[str, float]:
        """The losses' means over the passes, checked, as is the gradient's norm.

        All numbers of a step come from the device at once: each time the program waits for it, it falls idle after.

        Raises:
            TrainingError: one is not finite, here or in another process.
        """
        scalars = [loss for _, losses in passes for loss in losses.values()] + (
            [] if norm is None else [norm]
        )
        values = iter(torch.stack([scalar.float() for scalar in scalars]).tolist())
        metrics: dict[str, float] = {}
        broken: list[TrainingError] = []
        for images, losses in passes:
            for name, value in zip(losses, values, strict=False):
                metrics[name] = metrics.get(name, 0.0) + value / self.accumulate
                if not np.isfinite(value):
                    broken.append(self._error(f"the loss {name}", value, images))
        # Every process has to stop, or the others would wait for this one's gradients.
        if sum(comm.all_gather(len(broken))) if comm.get_world_size() > 1 else broken:
            if broken:
                raise broken[0]
            raise TrainingError(f"stage {self.stage}, iteration {self.iter}: another process stopped")
        if norm is not None:
            value = next(values)
            if not np.isfinite(value) and not self.scaler.is_enabled():
                images = [image for batch, _ in passes for image in batch]
                raise self._error("the gradient's norm", value, images)
            self.storage.put_scalar("grad_norm", value)
        return metrics

    def _error(self, what: str, value: float, images: list[dict]) -> TrainingError:
        names = ", ".join(str(image.get("file_name", image.get("image_id", "?"))) for image in images)
        return TrainingError(
            f"stage {self.stage}, iteration {self.iter}: {what} is {value}; the batch was {names}; nothing of this "
            'iteration is saved (a lower BASE_LR, AMP "" or cleaning these images\' labels may help, --resume '
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
