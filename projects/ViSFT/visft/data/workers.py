"""Worker processes of loaders, and what every loader asks of PyTorch's DataLoader."""

import os
import signal
import threading
from typing import Any

import torch
from detectron2.config import CfgNode


def num_workers(cfg: CfgNode) -> int:
    """Worker processes of a loader: DATALOADER.NUM_WORKERS, or as many as there are processors."""
    # More than there are processors only wait for one another, and torch warns of them; the batches are the same.
    return min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)


def pins_memory(cfg: CfgNode) -> bool:
    """Whether images lie in memory that a GPU copies from while it computes: where MODEL.DEVICE is one, and there."""
    return torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()


def loader_options(workers: int, pin_memory: bool) -> dict[str, Any]:
    """Arguments of a DataLoader.

    Args:
        workers: processes that load; 0: the caller itself.
        pin_memory: see `pins_memory`.
    """
    # Without one of its own, a DataLoader draws from the global generator whenever it starts, and a resumed run, which
    # starts loaders at other moments, would go another way.
    generator = torch.Generator().manual_seed(0)
    return {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "generator": generator,
        "worker_init_fn": outlive_signals,
    }


def outlive_signals(worker: int) -> None:
    """Make a loader's worker leave it to its parent when to end, for one that was asked to stop finishes its iteration.

    Slurm and others send their signals to all processes of a run. SIGTERM from the parent itself ends the worker.

    Args:
        worker: its number, as DataLoader's `worker_init_fn` gets it.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Who sent a signal is told to those alone that wait for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
