"""Worker processes of loaders, and common options of PyTorch's DataLoader."""

import os
import signal
import threading
from typing import Any

import torch
from detectron2.config import CfgNode


def num_workers(cfg: CfgNode) -> int:
    """Return the number of a loader's worker processes: DATALOADER.NUM_WORKERS, at most the number of CPUs."""
    # More workers would only wait for one another, and torch warns about them. The batches are the same.
    return min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)


def pins_memory(cfg: CfgNode) -> bool:
    """Whether to pin memory, from which a GPU copies while it computes: if MODEL.DEVICE is a GPU that exists."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()


def loader_options(workers: int, pin_memory: bool) -> dict[str, Any]:
    """Return the arguments of a DataLoader.

    Args:
        workers: number of worker processes; 0: load in the calling process.
        pin_memory: see `pins_memory`.
    """
    # Without its own generator, a DataLoader uses the global one whenever it starts. A resumed run starts loaders at
    # other times and would get other random numbers.
    generator = torch.Generator().manual_seed(0)
    return {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "generator": generator,
        "worker_init_fn": outlive_signals,
    }


def outlive_signals(worker: int) -> None:
    """Make a loader's worker ignore signals that are not from its parent, which first finishes its iteration.

    Slurm and others send signals to all processes of a run. SIGTERM from the parent ends the worker.

    Args:
        worker: its index, from DataLoader's `worker_init_fn`.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Only `sigwaitinfo` tells who sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
