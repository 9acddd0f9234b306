"""`tools/benchmark.py --against reference`: our training step beside the authors' way, with the same weights.

The reference recipe is in tests/reference of the repository. Each way has a process of its own, so that the system's
count of its peak memory is of one way. The processes take turns, part by part.
"""

import argparse
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import visft
from visft import export
from visft.applications import speed
from visft.applications.reference_report import (
    ALL,
    CACHED,
    CHECKPOINTED,
    EXPORT,
    FORWARD,
    HEADS,
    INFERENCE,
    LOADER,
    OURS,
    RATIO,
    REFERENCE,
    STAGE_1,
    STEP,
    parts,
    plot,
    report,
    summary,
)
from visft.checkpoint import files
from visft.engine.feature_cache import cached_features
from visft.engine.trainer import seeded_iteration
from visft.errors import ConfigError, TrainingError
from visft.modeling.meta_arch import ViSFT

_LOADED = 16
"""Batches that `loader` reads."""
_CACHE = 8.0
"""GiB for the features of one batch: more than any takes."""


def run(args: argparse.Namespace) -> None:
    """Check, measure, print tables as Markdown, write figures and plot."""
    reference_folder()
    if args.stage != "lora":
        raise ConfigError("--against reference has parts of both stages in one table; leave out --stage")
    image = args.plot or (args.output and str(Path(args.output).with_suffix(".png")))
    if image and Path(image).suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot is {image}; expected a file with the suffix .png or .svg")
    cfg = speed.checked_config(args)
    with contextlib.ExitStack() as running:
        ways = {name: running.enter_context(_Worker(name, args)) for name in (OURS, REFERENCE, STAGE_1)}
        conditions = {name: worker.answer() for name, worker in ways.items()}[OURS]
        rounds = [
            {
                part: {name: ways[name].measure(part, memory=number == 0) for name in names}
                for part, names in parts(cfg.MODEL.VISFT.HEADS).items()
            }
            for number in range(args.rounds + 1)
        ]
    found = conditions | summary(rounds)
    if args.output:
        files.write_json(args.output, found)
    if image:
        plot(found, Path(image))
    print(report(found), flush=True)


def reference_folder() -> Path:
    """Where the reference recipe is.

    Raises:
        ConfigError: this is no checkout of the repository.
    """
    folder = Path(visft.__file__).resolve().parents[3] / "tests" / "reference"
    if not (folder / "reference_recipe.py").is_file():
        raise ConfigError(
            f"--against reference: the reference recipe is a part of the repository's tests, and {folder} has no "
            "reference_recipe.py; run tools/benchmark.py of a checkout with its own package (pip install -e .)"
        )
    return folder


def as_reference(model: ViSFT) -> ViSFT:
    """See `tests/reference/reference_recipe.py`."""
    sys.path.insert(0, str(reference_folder()))
    return importlib.import_module("reference_recipe").as_reference(model)


class _Worker:
    """A process that measures one way. A context manager; the process ends with it, and with this process."""

    def __init__(self, name: str, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._name, (self._connection, theirs) = name, context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, args, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # it has nothing to lose
        self._process.join()
        self._connection.close()

    def measure(self, part: str, memory: bool) -> dict:
        """See `Way.measure`."""
        self._connection.send((part, memory))
        return self.answer()

    def answer(self) -> dict:
        """What the process sends.

        Raises:
            Exception: what stopped it.
        """
        try:
            found = self._connection.recv()
        except EOFError:
            raise TrainingError(f"the process that measures `{self._name}` ended without an answer") from None
        if isinstance(found, Exception):
            raise found
        return found


def _serve(connection: Connection, name: str, args: argparse.Namespace, threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, the parent speaks
    with contextlib.suppress(EOFError):  # the other end is closed
        try:
            way = Way(name, args)
            found = speed.conditions(args, way.cfg, way.images, way.device)
            connection.send(found | {"clock": way.clock.__name__})
            while True:
                connection.send(way.measure(*connection.recv()))
        except EOFError:
            raise
        except Exception as error:
            connection.send(error)


class Way:
    """One way to train, and its parts.

    On a CPU with one thread, times are those of the processor, which other programs on the machine affect less.

    Args:
        name: OURS, REFERENCE or STAGE_1.
        args: of the command.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        args.stage = "heads" if name == STAGE_1 else "lora"
        self.cfg = speed.checked_config(args)
        self.name, (self.model, self.loader) = name, speed.build(self.cfg, args.stage, args.images)
        self.backbone, self.device = self.model.backbone, self.model.device
        self.images = next(self.loader)
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = processor_time if alone else time.perf_counter
        _move_lora(self.backbone)
        if name == REFERENCE:
            as_reference(self.model)
        self.trainer = speed.trainer_of(self.cfg, self.model)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = 0.0  # every iteration does the same, and both ways stay equal
        self._losses: dict[str, float] = {}
        with torch.no_grad(), _first_input(self.backbone) as seen:
            self.inputs = self.model.extract(self.images)
        [self.pixels] = seen

    def measure(self, part: str, memory: bool) -> dict:
        """Do a part once.

        Args:
            memory: whether its peak memory is wanted. Freed memory is given back to the system for that; the part gets
                it anew, which takes time.

        Returns:
            `seconds`, `memory` (peak, GiB), `images` (how many passed) and `losses` (by name; of iterations).
        """
        self._losses = {}
        if memory:
            _give_back_memory()
        with self._prepared(part) as work:
            speed.reset_peak(self.device)  # waits for the GPU
            start = self.clock()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = self.clock() - start
        found = {"seconds": seconds, "memory": speed.peak(self.device), "losses": self._losses}
        self.model.zero_grad(set_to_none=True)
        return found | {"images": len(self.images) * (_LOADED if part == LOADER else 1)}

    def _prepared(self, part: str) -> contextlib.AbstractContextManager[Callable[[], object]]:
        """A context that does what is not timed, with the work to time."""
        tasks = [[image | {"task": name} for image in self.images] for name in self.model.heads]
        if part.startswith("head "):
            return nullcontext(lambda: self._head(self.model.heads[part.removeprefix("head ")]))
        return {
            FORWARD: lambda: nullcontext(self._forward),
            STEP: lambda: self._step(checkpointing=False),
            CHECKPOINTED: lambda: self._step(checkpointing=True),
            ALL: lambda: nullcontext(
                lambda: self._iterations(tasks if self.name == REFERENCE else [self.images])
            ),
            RATIO: lambda: nullcontext(lambda: self._iterations(tasks)),
            HEADS: lambda: nullcontext(lambda: self._iterations([self.images])),
            CACHED: self._cached,
            LOADER: lambda: nullcontext(lambda: [next(self.loader) for _ in range(_LOADED)]),
            INFERENCE: self._inference,
            EXPORT: self._export,
        }[part]()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self.backbone(self.pixels)[self.model.feature]

    @contextlib.contextmanager
    def _step(self, checkpointing: bool) -> Iterator[Callable[[], None]]:
        """Forward, backward from a fixed gradient on the features, optimizer."""
        before, self.backbone.activation_checkpointing = self.backbone.activation_checkpointing, checkpointing
        gradient = torch.ones_like(self.inputs.features)

        def step() -> None:
            self.backbone(self.pixels)[self.model.feature].backward(gradient)
            self.trainer.optimizer.step()

        yield step
        self.backbone.activation_checkpointing = before

    def _head(self, head: nn.Module) -> None:
        """A head's losses on fixed features, and their gradient on these."""
        inputs = replace(self.inputs, features=self.inputs.features.detach().requires_grad_())
        with seeded_iteration(0, "lora", 0):
            head.draw()
            sum(head.losses(inputs, head.normalizers(self.images)).values()).backward()

    def _iterations(self, batches: list[list[dict]]) -> None:
        """The trainer's iterations, all with the random numbers of the first."""
        self.trainer.iter = 0
        for batch in batches:
            self.trainer.batches = iter([batch])
            with EventStorage() as self.trainer.storage:
                self.trainer.run_step()
                latest = self.trainer.storage.latest()
            self._losses |= {name: value for name, (value, _) in latest.items() if "/" in name}

    @contextlib.contextmanager
    def _cached(self) -> Iterator[Callable[[], None]]:
        with cached_features(self.backbone, _CACHE):
            self.model.extract(self.images)
            yield lambda: self._iterations([self.images])

    @contextlib.contextmanager
    def _inference(self) -> Iterator[Callable[[], object]]:
        self.model.eval()
        with torch.inference_mode():
            yield lambda: self.model(self.images)
        self.model.train()

    @contextlib.contextmanager
    def _export(self) -> Iterator[Callable[[], object]]:
        """The tower as an open_clip file, which a fresh process opens and compares."""
        about = export.Facts(data=(), command="", figures={}, run="")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tower.safetensors"
            yield lambda: export.FORMATS["open_clip"].write(self.backbone, path, facts=about)


def processor_time() -> float:
    """Seconds of the processor that this process and those that it has waited for have taken."""
    return time.process_time() + sum(os.times()[2:4])


def _give_back_memory() -> None:
    """glibc keeps what was freed, and the system counts it."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _first_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, what a module is called with is collected."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    yield seen
    handle.remove()


@torch.no_grad()
def _move_lora(backbone: nn.Module) -> None:
    """Move fresh adapters away from zero, where B A has no effect."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if name.endswith("lora_B"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
