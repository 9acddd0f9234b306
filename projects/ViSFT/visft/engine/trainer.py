"""The training loop of one stage: detectron2's TrainerBase, extended for the recipe and for exact resuming."""

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
from visft.engine.optimizer import average_gradients, clip_gradients
from visft.errors import TrainingError
from visft.utils import mixed_precision, progress, shared_random


def seed_iteration(seed: int, stage: str, iteration: int, rank: int = 0) -> None:
    """Seed every global generator for one iteration.

    Random numbers then depend only on the iteration and the process, so a killed run resumes exactly.
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
    """Seed the random numbers of one iteration.

    Dropout differs between processes. Sampled points and similar random numbers also depend on the image and equal
    those of one process with the joined batch, so the number of processes affects only dropout.
    """
    seed_iteration(seed, stage, iteration, comm.get_rank())
    with shared_random.seeded(_seed_of(seed, stage, iteration) % 2**63):
        yield


class StageTrainer(TrainerBase):
    """Trains parameters with `requires_grad`, with gradient accumulation, clipping and automatic mixed precision.

    Args:
        model: maps a batch (list of image dicts) to a dict of scalar losses.
        batches: endless iterator of batches, positioned at the first iteration to run.
        optimizer: for the trained parameters.
        stage: its name, for seeds and messages.
        accumulate: batches per step, whose gradients are averaged.
        clip_norm: maximum L2 norm of the gradient; 0: no clipping.
        amp: "", "bfloat16" or "float16" (CUDA, with loss scaling).
        seed: of all random numbers of an iteration.
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

        Unlike detectron2's trainer, this does not log the traceback of an error, and the hooks that act
        after training (evaluation) run only if it succeeded.
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
            TrainingError: a loss or the gradient is not finite. The weights are unchanged then.
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
        """Clip the gradient. Returns its norm before clipping, or None without a gradient."""
        if all(parameter.grad is None for parameter in self.parameters):
            return None
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.clip_norm if self.clip_norm > 0 else float("inf"))

    def _read(
        self, passes: list[tuple[list[dict], dict[str, torch.Tensor]]], norm: torch.Tensor | None
    ) -> dict[str, float]:
        """Return the means of the losses over the passes, after checking them and the gradient's norm.

        All numbers of a step are copied from the device at once, because each copy waits for the device.

        Raises:
            TrainingError: a number is not finite, in this process or another one.
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
        # All processes must stop together, because they wait for each other's gradients.
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
            'iteration is saved (try a lower BASE_LR, AMP "", or correcting the labels of these images; --resume '
            "continues from the last checkpoint)"
        )

    def _log(self, metrics: dict[str, float], data_time: float) -> None:
        gathered = comm.gather((metrics, data_time))
        if not comm.is_main_process():
            return
        rows = [row for row, _ in gathered]
        names = list(dict.fromkeys(name for row in rows for name in row))
        mean = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
        # All processes wait for the slowest loader.
        self.storage.put_scalar("data_time", max(seconds for _, seconds in gathered))
        if mean:
            self.storage.put_scalar("total_loss", sum(mean.values()))
            self.storage.put_scalars(**mean)
