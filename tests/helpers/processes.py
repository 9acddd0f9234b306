"""Runs tools in processes of their own that need not import torch and detectron2 first: they are forked from a server
that has. Otherwise they are processes like any other, and can be killed."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "visft.engine.launch",
        "open_clip",
        "torch.utils.tensorboard",
        "scipy.optimize",
        "detectron2.utils.visualizer",
    ]
)


def start(
    tool: str,
    arguments: list[str],
    log: Path,
    *,
    folder: Path | None = None,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> multiprocessing.Process:
    """Start `tools/<tool>` with its output going to the end of `log`, in a folder: builtin data sets are in its folder
    `datasets`, for detectron2 has read DETECTRON2_DATASETS when it was imported. `before`, a function of a module, is
    called first."""
    return begin(_run, tool, arguments, str(log), folder, before, environment)


def run(tool: str, arguments: list[str], log: Path, *, timeout: float = 300, **options) -> tuple[int, str]:
    """Run `tools/<tool>` to its end, as `start` does; returns its exit status and what it has written."""
    process = start(tool, arguments, log, **options)
    process.join(timeout)
    assert process.exitcode is not None, f"{tool} hangs: {log.read_text()}"
    return process.exitcode, log.read_text()


def start_group(
    tool: str, arguments: list[str], log: Path, count: int = 2, before: Callable[[], None] | None = None
) -> list[multiprocessing.Process]:
    """Start `count` processes that find each other as torchrun's do. `log` gets a suffix `.0`, `.1`, ...

    One process is one that nobody started as a group.
    """
    if count == 1:
        return [start(tool, arguments, log, before=before)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(count)]
    return [
        start(tool, arguments, log, before=before, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, log in enumerate(logs)
    ]


def begin(function: Callable[..., None], *arguments) -> multiprocessing.Process:
    """Start a process that calls a function of a module."""
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def call(function: Callable[..., None], *calls: tuple) -> None:
    """Call a function of a module in as many processes as there are arguments for, at once; all must end well."""
    started = [begin(function, *arguments) for arguments in calls]
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * len(calls)


def read_exports_here() -> None:
    """`before` of a run whose exports need not be read in a process of its own."""
    import small_towers

    from visft.export import verification

    verification.read = small_towers.read_here


def fork_group() -> None:
    """`before` of a run by `--num-gpus` whose processes need not import everything themselves."""
    import torch

    spawned = torch.multiprocessing.start_processes
    torch.multiprocessing.start_processes = lambda *args, **more: spawned(
        *args, **{**more, "start_method": "fork"}
    )


def descendants(pid: int) -> list[int]:
    """The process ids of the children of a process, and of theirs."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def _run(
    tool: str,
    arguments: list[str],
    log: str,
    folder: Path | None,
    before: Callable[[], None] | None,
    environment: dict[str, str],
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    os.chdir(folder or os.getcwd())
    # Workers of loaders too are forked from a process that has imported everything, as outside of tests.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.argv = [tool, *arguments]
    sys.path.insert(0, str(ROOT / "tools"))  # as for a script
    runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
