"""torchrun starts all processes again when one is lost; the run ends with the bits of one that lost none."""

import os
import signal
import subprocess
import sys
import time

import processes
import pytest
from safetensors.torch import load_file
from tiny_run import tiny_arguments

LAST = "lora/model_0000012.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_a_killed_process_is_started_again(shapes_train, tmp_path, strategy):
    def arguments(name: str) -> list[str]:
        keys = {f"VISFT.SOLVER.{stage}.MAX_ITER": "12" for stage in ("HEADS", "LORA")}
        keys["VISFT.STRATEGY"] = strategy
        words = [word for pair in keys.items() for word in pair]
        return [*tiny_arguments(shapes_train, None, tmp_path / name), *words]

    group = processes.start_group("train_net.py", arguments("whole"), tmp_path / "log")
    for process in group:
        process.join(300)
    assert [process.exitcode for process in group] == [0, 0]

    tool = [str(processes.ROOT / "tools" / "train_net.py"), *arguments("killed")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(tmp_path / "torchrun.log", "w") as log:
        run = subprocess.Popen(
            [*command, "--max-restarts", "1", *tool],
            env=os.environ
            | {"OMP_NUM_THREADS": "1"},  # as in the other run: sums round by the number of threads
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while run.poll() is None and not list((tmp_path / "killed" / "lora").glob("model_*")):
                time.sleep(0.01)
            ranks = [pid for pid in processes.descendants(run.pid) if _rank(pid) == "1"]
            os.kill(ranks[0], signal.SIGKILL)
            assert run.wait(300) == 0, (tmp_path / "torchrun.log").read_text()
        finally:
            run.kill()
    assert not (tmp_path / "killed" / "earlier-1").exists()
    found, expected = (load_file(tmp_path / name / LAST) for name in ("killed", "whole"))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def _rank(pid: int) -> str:
    with open(f"/proc/{pid}/environ", "rb") as file:
        environment = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
    return environment.get(b"RANK", b"").decode()
