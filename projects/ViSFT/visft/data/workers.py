"""Worker processes of loaders."""

import os
import signal
import threading


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
