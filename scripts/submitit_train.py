#!/usr/bin/env python
r"""Runs tools/train_net.py on a Slurm cluster through submitit: one task a GPU, requeued until the run is complete.

    pip install submitit
    scripts/submitit_train.py --nodes 1 --gpus-per-node 8 --logs output/slurm \
        -- --config-file configs/visft_vit_b16.yaml OUTPUT_DIR output/visft

What follows `--` are the arguments of tools/train_net.py, without --num-gpus. Every start has --resume. OUTPUT_DIR and
--logs must be on a disk that all nodes share. Before the time limit, or when the job is preempted, the run writes a
checkpoint, and submitit puts the job into the queue again. `--cluster local` runs the tasks on this machine instead
(without GPUs: `--gpus-per-node 0 --tasks-per-node 2`).
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STOPPED = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


class Training:
    """One task: a process of tools/train_net.py, which finds the others as under torchrun."""

    def __init__(self, words: list[str]):
        self.words = words

    def __call__(self) -> int:
        import submitit

        # The run itself chooses the GPU of its LOCAL_RANK.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume", *self.words]
        self._process = subprocess.Popen(command, preexec_fn=_leave_submitits_signal)
        status = self._process.wait()
        if status not in (0, *STOPPED):
            raise RuntimeError(
                f"tools/train_net.py ended with status {status}; see its message in the task's log"
            )
        return status

    def checkpoint(self):
        """Called by submitit in task 0 before the job is stopped. Stops the whole run, which saves first."""
        import submitit

        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
            os.kill(self._process.pid, signal.SIGUSR1)
            # Not `wait`: `__call__`, which submitit has interrupted for this, is inside it.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Training(self.words))


def _leave_submitits_signal() -> None:
    """Slurm sends it to all processes of a task. Only submitit's own process acts on it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def main() -> None:
    import submitit

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", default="slurm", choices=["slurm", "local"])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--tasks-per-node", type=int, default=0, help="default: --gpus-per-node")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="for a process and its loader's workers")
    parser.add_argument("--minutes", type=int, default=24 * 60, help="time limit of the job")
    parser.add_argument("--partition", default="")
    parser.add_argument("--logs", default="output/slurm", help="submitit's folder")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS")
    args = parser.parse_args()
    words = args.words[args.words[:1] == ["--"] :]
    if "--num-gpus" in words or "--config-file" not in words:
        parser.error("expected `-- --config-file FILE [KEY VALUE ...]`, without --num-gpus")
    executor = submitit.AutoExecutor(folder=args.logs, cluster=args.cluster)
    executor.update_parameters(
        name="visft",
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        tasks_per_node=args.tasks_per_node or args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        timeout_min=args.minutes,
        **({"slurm_partition": args.partition} if args.partition else {}),
        slurm_signal_delay_s=120,
    )
    job = executor.submit(Training(words))
    print(f"job {job.job_id}: logs in {job.paths.folder}", flush=True)
    if args.cluster == "local":
        print(f"ended with {job.results()}")


if __name__ == "__main__":
    main()
