"""Checks and processes of `tools/train_net.py`."""

import argparse
import datetime
import os
import socket
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from visft.data import register_own_data
from visft.engine import checks, from_run, run_lock, settings, stages, stock, stopping
from visft.errors import ConfigError, Stopped, TrainingError
from visft.utils import cli


def train_config(config: str, opts: Sequence[str], *, resume: bool = False) -> int:
    """Train in this process with a config file and changed keys. Returns the exit status of the tool."""
    args = argparse.Namespace(
        config_file=config,
        opts=[*opts],
        resume=resume,
        eval_only=False,
        num_gpus=1,
        num_machines=1,
        machine_rank=0,
    )
    return cli.guard(train, args, again=cli.RESUME)


def train(args: argparse.Namespace) -> None:
    """Run all checks, then train in the requested number of processes."""
    args.resume = args.resume or _restarts() > 0
    cfg = prepare(args)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        _worker(int(os.environ["LOCAL_RANK"]), args, cfg, "env://")
    elif args.num_gpus * args.num_machines > 1:
        url = args.dist_url if args.num_machines > 1 else f"tcp://127.0.0.1:{_free_port()}"
        _start_processes(args, cfg, url)
    else:
        run(args, cfg)


def _restarts() -> int:
    """How often torchrun has started all processes again, as it does when one is lost (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def prepare(args: argparse.Namespace) -> CfgNode:
    """Return the frozen config for parsed arguments, after every check that needs no weights.

    Raises:
        ConfigError, DataError, CheckpointError: the first fault.
    """
    weights = getattr(args, "weights", "")
    if args.eval_only and weights and not args.config_file:
        cfg = from_run.run_config(weights, args.opts, test=True)
    else:
        cfg = settings.load_config(args.config_file, args.opts)
        if not args.config_file:
            raise ConfigError(
                "--config-file is missing: give one of configs/*.yaml (with --eval-only, --weights RUN is enough)"
            )
        cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
        if args.eval_only:
            if args.resume and cfg.MODEL.META_ARCHITECTURE == "ViSFT":
                cfg.MODEL.WEIGHTS = cfg.OUTPUT_DIR
            from_run.adopt(cfg)
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} and --num-machines is {args.num_machines}; expected at least 1 each"
        )
    checks.check(
        cfg,
        processes=processes(args),
        local_processes=args.num_gpus,
        train=not args.eval_only,
        here=not getattr(args, "plan", False),
    )
    cfg.freeze()
    return cfg


def processes(args: argparse.Namespace) -> int:
    """The number of a run's processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", args.num_gpus * args.num_machines))


def run(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Run in this process. With several processes, the process group must exist."""
    # The rounding of sums depends on the number of threads. Setting it keeps MKL from choosing its own (MKL_DYNAMIC),
    # so that a run resumed with the same number has the same bits.
    torch.set_num_threads(torch.get_num_threads())
    runner = stages if cfg.MODEL.META_ARCHITECTURE == "ViSFT" else stock
    with stopping.on_signals():
        if args.eval_only:  # needs no lock, because it writes none of a run's files
            runner.evaluate_only(cfg, args)
            return
        with run_lock.locked(cfg.OUTPUT_DIR):
            runner.run(cfg, args)


def _worker(local_rank: int, args: argparse.Namespace, cfg: CfgNode, url: str) -> None:
    if url == "env://":
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    else:
        rank, world = args.machine_rank * args.num_gpus + local_rank, args.num_gpus * args.num_machines
        local_world = args.num_gpus
    cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    join_group("nccl" if cuda else "gloo", url, rank, world, cfg.VISFT.PROCESS_TIMEOUT)
    try:
        comm.create_local_process_group(local_world)
        comm.synchronize()
        run(args, cfg)
    finally:
        if torch.distributed.is_initialized():  # a successful run has already left the group
            torch.distributed.destroy_process_group()


def join_group(backend: str, url: str, rank: int, world: int, minutes: float) -> None:
    """Create the process group of a run.

    Args:
        minutes: VISFT.PROCESS_TIMEOUT, the timeout of all collective operations.
    """
    timeout = datetime.timedelta(minutes=minutes)
    store, rank, world = next(torch.distributed.rendezvous(url, rank, world, timeout=timeout))
    # torchrun keeps its store over restarts, with the addresses of the processes of earlier starts.
    store = torch.distributed.PrefixStore(f"start_{_restarts()}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    # detectron2 gathers through a gloo group that it creates with the default timeout of 30 minutes.
    gathering = comm._get_global_gloo_group()
    gathering._get_backend(torch.device("cpu"))._set_default_timeout(timeout)


def _guarded_worker(local_rank: int, args: argparse.Namespace, cfg: CfgNode, url: str) -> None:
    register_own_data(cfg)  # a spawned process starts with empty catalogs
    from_run.register_classes(cfg)
    os.environ.setdefault("RANK", str(args.machine_rank * args.num_gpus + local_rank))
    status = cli.guard(_worker, local_rank, args, cfg, url, again=cli.RESUME)
    if status:
        os._exit(status)  # at once, because the other processes wait for this one


def _start_processes(args: argparse.Namespace, cfg: CfgNode, url: str) -> None:
    """Start one process per GPU and wait for all of them."""
    pids: list[int] = []
    try:
        with stopping.forwarded(lambda: pids):
            context = torch.multiprocessing.start_processes(
                _guarded_worker, args=(args, cfg, url), nprocs=args.num_gpus, join=False, start_method="spawn"
            )
            pids += context.pids()
            while not context.join():
                pass
    except torch.multiprocessing.ProcessExitedException as error:
        for number in stopping.SIGNALS:
            if error.exit_code in (-number, 128 + number):
                raise Stopped(number) from error
        raise TrainingError(
            f"process {error.error_index} of {len(context.processes)} ended with status {error.exit_code}, so the "
            "others were stopped; see its message above"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
