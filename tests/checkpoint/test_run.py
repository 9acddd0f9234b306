"""Checkpoints of a stage: an interrupted run ends where an uninterrupted one does, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visft.checkpoint import files
from visft.checkpoint.run import RunCheckpointer, pack, unpack
from visft.checkpoint.run_folder import describe, newest_checkpoint
from visft.errors import CheckpointError

# Here and in the children, which are killed or not: runs with other thread counts differ in their last bits.
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Base:
    name: str = "visft-tiny"
    pretrained: str = "demo"
    sha256: str | None = "ab" * 32
    clip: object = None  # more than a file should hold


class Training:
    """A small training that draws from every generator: Adam, a schedule, dropout, batch norm, a frozen layer."""

    def __init__(self, folder, *, keep=2, stage="heads", base=None, width=4):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, width)
        self.model = nn.Sequential(*layers)
        self.model[0].requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([{"params": trained, "lr": 0.1, "name": "heads"}])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: 1 / (1 + i))
        self.checkpointer = RunCheckpointer(
            folder,
            self.model,
            self.optimizer,
            self.scheduler,
            stage=stage,
            base=base or Base(clip=object()),
            settings={"rank": 4},
            keep=keep,
        )

    def run(self, start, end, period=2):
        for iteration in range(start, end):
            noise = torch.randn(5, 3) + random.random() + float(np.random.rand())
            self.model(noise).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            if (iteration + 1) % period == 0:
                self.checkpointer.save(iteration + 1)
        return {k: v.clone() for k, v in self.model.state_dict().items()}

    def end(self, end=10, period=2):
        return self.run(self.checkpointer.resume(), end, period)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_resumed_training_ends_the_same_to_the_bit(tmp_path):
    expected = Training(tmp_path / "straight").run(0, 10)
    Training(tmp_path / "broken").run(0, 7)
    resumed = Training(tmp_path / "broken")
    assert resumed.checkpointer.resume() == 6
    assert same(resumed.run(6, 10), expected)


def test_what_is_in_a_checkpoint(tmp_path):
    training = Training(tmp_path)
    training.run(0, 8)
    names = ["last_checkpoint"]
    names += [f"{k}_000000{i}.{e}" for i in (6, 8) for k, e in (("model", "json"), ("model", "safetensors"))]
    names += [f"trainer_000000{i}.safetensors" for i in (6, 8)]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000008.safetensors"
    # What trained, with the running statistics of its batch norm, and nothing of the frozen layer.
    path = tmp_path / "model_0000008.safetensors"
    assert {n.partition(".")[0] for n in files.read_tensors(path)} == {"1", "3"}
    assert "1.running_var" in files.read_tensors(path)
    about = json.loads((tmp_path / "model_0000008.json").read_text())
    assert about["base"] == {"name": "visft-tiny", "pretrained": "demo", "sha256": "ab" * 32}
    assert (about["stage"], about["iteration"], about["settings"]) == ("heads", 8, {"rank": 4})
    del about["files"]
    assert describe(path) == about
    for file in tmp_path.iterdir():
        assert b"\x80\x02}" not in file.read_bytes()[:3], "no pickle"


def fork(work) -> int:
    """Run `work` in a copy of this process, which ends without cleaning up; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            assert torch.get_num_threads() == 1, "OpenMP's threads do not survive a fork"
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ended_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def die_at(fatal: int) -> None:
    """Make this process kill itself at the n-th moment before or after a call that changes the disk."""
    count = 0

    def moment():
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(real):
        def call(*args, **kwargs):
            moment()
            result = real(*args, **kwargs)
            moment()
            return result

        return call

    os.replace, os.unlink, os.fsync = dying(os.replace), dying(os.unlink), dying(os.fsync)


def kill_at_every_file_operation(tmp_path):
    def save_twice_and_die(folder, fatal):
        training = Training(folder, keep=1)
        training.run(0, 4, period=4)
        die_at(fatal)
        training.run(4, 6)

    deaths = 0
    while not ended_well(
        fork(lambda: save_twice_and_die(tmp_path / str(deaths + 1), deaths + 1))  # noqa: B023
    ):
        deaths += 1
        assert deaths < 100
    assert deaths >= 30, "four files written, each synced and renamed; three removed; before and after each"

    expected, seen = Training(tmp_path / "straight").run(0, 10), []
    for fatal in range(1, deaths + 1):
        folder = tmp_path / str(fatal)
        training = Training(folder)
        seen.append(training.checkpointer.resume())
        assert not list(folder.glob(".*")), "half-written files are cleaned up"
        assert same(training.run(seen[-1], 10), expected)
    assert sorted(seen) == seen and set(seen) == {4, 6}


def kill_at_random_moments(tmp_path):
    expected = Training(tmp_path / "straight").run(0, 100, period=1)
    generator, resumed = random.Random(0), []
    for kill in [True] * 6 + [False]:
        child = fork(lambda: Training(tmp_path / "run").end(100, period=1))
        if kill:
            time.sleep(generator.uniform(0.05, 0.3))
            os.kill(child, signal.SIGKILL)
        assert ended_well(child) or kill
        resumed.append(Training(tmp_path / "run").checkpointer.resume())
    assert resumed == sorted(resumed) and resumed[-1] == 100
    training = Training(tmp_path / "run")
    training.checkpointer.resume()
    assert same(training.model.state_dict(), expected)


@pytest.mark.parametrize("kills", [kill_at_every_file_operation, kill_at_random_moments])
def test_kills(tmp_path, kills):
    """Any kill loses at most the save that it interrupts. In a process of its own: one in which autograd has started
    threads, as an export to ONNX does, cannot be forked."""
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_run; "
        f"test_run.{kills.__name__}(pathlib.Path(sys.argv[1]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["model_0000006.safetensors", "trainer_0000006.safetensors", "model_0000006.json"]
)
@pytest.mark.parametrize("harm", ["cut", "gone", "empty"])
def test_a_broken_newest_checkpoint_is_passed_over(tmp_path, name, harm, caplog):
    expected = Training(tmp_path / "straight").run(0, 10)
    Training(tmp_path / "run").run(0, 6)
    path = tmp_path / "run" / name
    if harm == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if harm == "empty" else path.stat().st_size // 2)
    training = Training(tmp_path / "run")
    assert training.checkpointer.resume() == 4
    assert same(training.run(4, 10), expected)
    assert harm == "gone" or "passed over" in caplog.text


def test_nothing_to_resume(tmp_path):
    assert Training(tmp_path / "absent").checkpointer.resume() == 0
    assert newest_checkpoint(tmp_path) is None


def test_another_stage_base_or_model_is_refused(tmp_path):
    Training(tmp_path).run(0, 2)
    with pytest.raises(CheckpointError, match="stage `heads`, stage `lora` was to be resumed"):
        Training(tmp_path, stage="lora").checkpointer.resume()
    with pytest.raises(CheckpointError, match="trained on the tower visft-tiny, the config names ViT-B-16"):
        Training(tmp_path, base=Base(name="ViT-B-16")).checkpointer.resume()
    with pytest.raises(CheckpointError, match="other base weights"):
        Training(tmp_path, base=Base(sha256="cd" * 32)).checkpointer.resume()
    with pytest.raises(CheckpointError, match=r"3.weight: \[4, 4\], expected \[5, 4\]"):
        Training(tmp_path, width=5).checkpointer.resume()


def test_an_earlier_run_is_set_aside_not_resumed_nor_lost(tmp_path):
    for number in (1, 2):
        Training(tmp_path).run(0, 2)
        training = Training(tmp_path)
        training.checkpointer.set_aside()
        assert training.checkpointer.resume() == 0
        assert newest_checkpoint(tmp_path / f"earlier-{number}") is not None
    assert sorted(os.listdir(tmp_path)) == ["earlier-1", "earlier-2"]


def test_keep_all(tmp_path):
    Training(tmp_path, keep=0).run(0, 8)
    assert len(list(tmp_path.glob("model_*.json"))) == 4


def test_pack_and_unpack_are_inverse():
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 2)}, "1": None},
        "groups": [{"betas": (0.9, 0.999), "lr": 1 / 3, "foreach": True, "params": [0, 1]}],
        "last": float("inf"),
        "empty": [(), {}, []],
    }
    tensors = {}
    text = json.dumps(pack(tree, tensors))
    back = unpack(json.loads(text), tensors)
    assert back["state"][0]["step"] == 3 and torch.equal(back["state"][0]["m"], tree["state"][0]["m"])
    del back["state"][0], tree["state"][0]
    assert back == tree
    with pytest.raises(TypeError, match="object"):
        pack([object()], {})
