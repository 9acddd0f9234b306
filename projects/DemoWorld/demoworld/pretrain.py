"""Contrastive pretraining of the demo tower on captioned, augmented single emoji.

The loss is CLIP's (Radford et al. 2021, section 2.3). Three methods make it fast on few cores: small images at first
(CLIPA, Li et al. 2023), dropped patches (FLIP, Li et al. 2022), and orthogonalised updates of hidden matrices (Muon,
Jordan et al. 2024). Random numbers depend only on the seed and the step, so a resumed run needs no generator state.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from demoworld import catalogue, files, tower
from demoworld.errors import DemoWorldError
from demoworld.optimizer import Optimizer
from demoworld.schedule import Phase, Settings
from demoworld.views import Views, step_generator

logger = logging.getLogger(__name__)

CHECKPOINT, RUN_FILE, LOG_FILE = "checkpoint.safetensors", "run.json", "log.jsonl"
FINAL_FILE = tower.WEIGHTS_FILE.name


def create_tower(seed: int) -> nn.Module:
    """Return a new `visft-tiny` CLIP in float32, determined by the seed."""
    import open_clip

    tower.register_open_clip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.create_model(tower.NAME)


def encode_image(visual: nn.Module, images: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Return embeddings `[B, D]` of square images of any size. `keep` `[B, K]`: indices of the patches to keep."""
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    grid = images.shape[-1] // visual.patch_size[0]
    position = visual.positional_embedding
    cls_position, position = position[:1], position[1:]
    native = visual.grid_size[0]
    if grid != native:
        square = position.T.reshape(1, -1, native, native)
        square = F.interpolate(
            square, size=(grid, grid), mode="bilinear", antialias=True, align_corners=False
        )
        position = square.flatten(2)[0].T
    x = x + position
    if keep is not None:
        x = x.gather(1, keep.unsqueeze(2).expand(-1, -1, x.shape[2]))
    cls = (visual.class_embedding + cls_position).expand(len(x), 1, -1)
    x = visual.transformer(visual.ln_pre(torch.cat([cls, x], 1)))
    return visual.ln_post(x[:, 0]) @ visual.proj


class Pretraining:
    """A pretraining run in a folder. `run()` starts or continues it.

    Args:
        output: folder of the run, with settings (`run.json`), log (`log.jsonl`), checkpoint, and finally weights.
        settings: of a new run.
        resume: continue the run in `output` with its settings.
        images: folders of further vendors' images, which are trained on as well.
        held_out_images: folders of vendors that are only evaluated.

    Raises:
        DemoWorldError: the folder has a run and `resume` is not set, or its checkpoint cannot be read.
    """

    def __init__(
        self,
        output: str | Path,
        settings: Settings | None = None,
        *,
        resume: bool = False,
        images: Sequence[str | Path] = (),
        held_out_images: Sequence[str | Path] = (),
        checkpoint_seconds: float = 120.0,
        evaluate_seconds: float = 900.0,
    ) -> None:
        self.output = Path(output)
        run_file = self.output / RUN_FILE
        if run_file.exists() and not resume:
            raise DemoWorldError(
                f"{self.output} already holds a run: give --resume to go on with it, or another folder"
            )
        if run_file.exists():
            settings = _settings_from(run_file)
        elif settings is None:
            raise DemoWorldError(
                f"{self.output} holds no run to go on with, and no settings for a new one were given"
            )
        self.settings = settings
        self.checkpoint_seconds, self.evaluate_seconds = checkpoint_seconds, evaluate_seconds
        self.views = Views(settings.classes, images, held_out_images)
        self.model = create_tower(settings.seed)
        self.optimizer = Optimizer(self.model, settings)
        self.average = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.average_weight = 0.0
        self.step = self.samples = 0
        self.seconds = 0.0
        self.output.mkdir(parents=True, exist_ok=True)
        if run_file.exists() and (self.output / CHECKPOINT).exists():
            self._load()
        else:
            files.write_json(run_file, asdict(settings))

    @property
    def progress(self) -> float:
        s = self.settings
        return min(1.0, self.samples / s.samples if s.samples else self.seconds / (60 * s.minutes))

    def run(self, stop_after: int | None = None) -> Path | None:
        """Train to the end and write the weights, or stop with a checkpoint after `stop_after` further steps.

        Returns:
            The file of the weights, or None if the run stopped before the end.

        Raises:
            DemoWorldError: the loss is not finite.
        """
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=self.model.context_length)
        last = saved = evaluated = reported = time.monotonic()
        steps = 0
        recent = (time.monotonic(), self.samples)
        while self.progress < 1.0:
            if stop_after is not None and steps >= stop_after:
                self.save()
                return None
            lr = self.settings.learning_rate(self.progress)
            phase = self.settings.phase(self.progress)
            loss = self._train_step(tokenizer, phase, lr)
            steps += 1
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - reported > 30:
                speed = (self.samples - recent[1]) / (now - recent[0])
                left = (self.settings.samples - self.samples) / speed if self.settings.samples else (
                    60 * self.settings.minutes - self.seconds
                )  # fmt: skip
                logger.info(
                    "%5.1f %%  step %d  %d samples  loss %.3f  lr %.1e  %d px  %.0f img/s  ETA %d min",
                    100 * self.progress, self.step, self.samples, loss, lr, phase.size, speed, max(0, left) // 60,
                )  # fmt: skip
                self._log(loss=loss, lr=lr, size=phase.size, images_per_second=round(speed, 1))
                recent = (now, self.samples)
                reported = now
            if now - evaluated > self.evaluate_seconds:
                self._log(**self._evaluate(views=1, vendors=1))
                evaluated = time.monotonic()
            if now - saved > self.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
        self.save()
        return self._finish()

    def _train_step(self, tokenizer, phase: Phase, lr: float) -> float:
        generator = step_generator(self.settings.seed, "training", self.step)
        images, captions = self.views.batch(phase.size, self.settings.batch_size, generator)
        keep = None
        if phase.patch_dropout:
            patches = (phase.size // 8) ** 2
            order = torch.rand(len(images), patches, generator=generator).argsort(1)
            keep = order[:, : max(1, round(patches * (1 - phase.patch_dropout)))]
        self.model.train()
        x = F.normalize(encode_image(self.model.visual, images, keep), dim=-1)
        unique = sorted(set(captions))
        y = self.model.encode_text(tokenizer(unique), normalize=True)
        place = {caption: i for i, caption in enumerate(unique)}
        logits = self.model.logit_scale.exp() * x @ y.T
        label = torch.tensor([place[c] for c in captions])
        loss = F.cross_entropy(logits, label)
        if len(unique) == len(captions):
            loss = 0.5 * (loss + F.cross_entropy(logits.T, label.argsort()))
        value = loss.item()
        if not math.isfinite(value):
            raise DemoWorldError(
                f"{self.output}: the loss is {value} at step {self.step}; the last checkpoint is sound"
            )
        loss.backward()
        self.optimizer.step(lr, self.step)
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            # This is a mean over about 1/(1 - average) steps. It is divided by its total weight later.
            decay = self.settings.average
            names = list(self.average)
            parameters = dict(self.model.named_parameters())
            torch._foreach_lerp_(
                [self.average[n] for n in names], [parameters[n].data for n in names], 1 - decay
            )
            self.average_weight = self.average_weight * decay + 1 - decay
        self.step += 1
        self.samples += len(images)
        return value

    def averaged(self) -> dict[str, torch.Tensor]:
        """Return the state of the complete CLIP with the running mean of the weights, in float32."""
        state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if self.average_weight:
            state.update({k: v / self.average_weight for k, v in self.average.items()})
        return state

    def _evaluate(self, views: int, vendors: int | None = None) -> dict[str, float]:
        """Return the zero-shot accuracy in per cent on the drawings of the first `vendors` vendors (None: all)."""
        model = create_tower(0)
        model.load_state_dict(self.averaged())
        model.eval()
        classes = tower.class_embeddings(model, self.views.names)
        names = ["openmoji", *(f"vendor{v}" for v in range(1, len(self.views.vendors)))]
        found = {}
        for v, name in enumerate(names[:vendors]):
            score = tower.zero_shot(model, self.views.evaluation(v, views=views), classes)
            found |= {f"{name}/top1": round(score["top1"], 2), f"{name}/top5": round(score["top5"], 2)}
        logger.info("step %d, %d samples: %s", self.step, self.samples, found)
        return found

    def _log(self, **values) -> None:
        line = {"step": self.step, "samples": self.samples, "seconds": round(self.seconds, 1), **values}
        with open(self.output / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the checkpoint atomically: weights, optimizer, running mean and counters."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in self.optimizer.state.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        counters = {k: getattr(self, k) for k in ("step", "samples", "seconds", "average_weight")}
        metadata = {"counters": json.dumps(counters)}
        files.write_tensors(self.output / CHECKPOINT, tensors, metadata)

    @torch.no_grad()
    def _load(self) -> None:
        path = self.output / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                counters = json.loads(file.metadata()["counters"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            targets = {f"model/{k}": v for k, v in self.model.state_dict().items()}
            targets |= {f"optimizer/{k}": v for k, v in self.optimizer.state.items()}
            targets |= {f"average/{k}": v for k, v in self.average.items()}
            if targets.keys() != tensors.keys():
                raise ValueError(f"its tensors differ: {sorted(targets.keys() ^ tensors.keys())[:3]}")
            for name, value in targets.items():
                value.copy_(tensors[name])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DemoWorldError(
                f"{path} cannot be resumed from ({error}); delete the folder to start anew"
            ) from error
        for name, value in counters.items():
            setattr(self, name, value)
        logger.info("resumed %s at step %d, %d samples", self.output, self.step, self.samples)

    def _finish(self) -> Path:
        file = self.output / FINAL_FILE
        state = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in self.averaged().items()}
        metadata = {"format": "pt", "architecture": tower.NAME, "pictures": catalogue.ATTRIBUTION}
        files.write_tensors(file, state, metadata)
        found = self._evaluate(views=4)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self._log(final=True, sha256=digest, bytes=file.stat().st_size, **found)
        return file


def _settings_from(run_file: Path) -> Settings:
    try:
        values = json.loads(run_file.read_text(encoding="utf-8"))
        values["phases"] = tuple(Phase(**phase) for phase in values["phases"])
        return Settings(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise DemoWorldError(f"{run_file} is no settings file of a pretraining run ({error})") from error
