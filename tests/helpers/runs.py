"""Whole runs of tools/train_net.py in processes of their own: to their end, killed, resumed; and what they end with."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import processes
import torch
from safetensors.torch import load_file


def words(keys: dict[str, object]) -> list[str]:
    """Keys and values as a command line has them."""
    return [str(word) for pair in keys.items() for word in pair]


def option(arguments: list[str], *options: str) -> list[str]:
    """`options` between the config file and the keys of `arguments`."""
    return [*arguments[:2], *options, *arguments[2:]]


def train(arguments: list[str], log: Path, **options) -> str:
    """Run to a good end (`options`: of `processes.start`); returns what was written."""
    status, text = processes.run("train_net.py", arguments, log, **options)
    assert status == 0, text
    return text


def stopped(arguments: list[str], log: Path, tool: str = "train_net.py") -> str:
    """Run to an error that is no traceback; returns what was written."""
    status, text = processes.run(tool, arguments, log, VISFT_DEBUG="")
    assert status == 1 and "Traceback" not in text, text
    return text


def killed_when(condition: Callable[[], bool], arguments: list[str], log: Path) -> None:
    """Run until the condition holds, and kill the run then."""
    process = processes.start("train_net.py", arguments, log)
    while process.is_alive() and not condition():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"it ended before it was killed: {log.read_text()}"


def rows(file: Path) -> list[dict]:
    """The lines of a metrics.json."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def newest(run: Path, stage: str) -> Path:
    """The model of a stage's newest checkpoint."""
    return run / stage / (run / stage / "last_checkpoint").read_text()


def end(run: Path, *stages: str) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoints and the optimizer's moments, which tell whether the batches were the
    same in the same order."""
    found = {}
    for stage in stages:
        model = newest(run, stage)
        trainer = model.with_name(model.name.replace("model", "trainer"))
        found |= {f"{model.name}/{stage}/{name}": tensor for name, tensor in load_file(model).items()}
        moments = {name: t for name, t in load_file(trainer).items() if t.is_floating_point()}
        found |= {f"{trainer.name}/{stage}/{name}": tensor for name, tensor in moments.items()}
    return found


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that one of two ends lacks, or has with other bits."""
    names = found.keys() | expected.keys()
    return [n for n in names if n not in found or n not in expected or not expected[n].equal(found[n])]


def assert_same_end(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert expected and different(found, expected) == []
