#!/usr/bin/env python
r"""Measures whether training steps wait for the loader.

    scripts/loader_queue.py --consumers 8 --step SECONDS [--batch 4] [--epochs 1] \
        [--config-file FILE] [KEY VALUE ...]
    scripts/loader_queue.py --synthetic 4096 --side 384 --consumers 8 --step SECONDS [...]

Each consumer is a process with its own training loader, as one GPU of a run has: the same records, mapper, order and
worker processes (DATALOADER.NUM_WORKERS each, at most one a CPU). Its step takes a batch and sleeps. `--synthetic`
writes shards of that many captioned JPEGs to a temporary folder first and trains on them; otherwise the data are those
of the config.

Prints one line of JSON:

    images, seconds            over all consumers, without the first step of each, which waits for the workers to start
    steps_that_waited          share of steps whose batch was not in the queue when they asked for it
    fetch_ms                   percentiles 50, 90, 99, 100 of the time to get a batch, with its transfer from the worker
                               (on a GPU, a thread of its own does this ahead of the step)
    cpu_ms_per_image           processor time of the workers, and what follows from it:
    images_per_s_of_a_worker   if each worker has a processor of its own
    workers_needed             images per second that the steps take / images per second of a worker
    worker_mib                 proportional set size (PSS) of a worker, mean over all: at the start, after each epoch
    index_s                    for --synthetic: time to index the shards
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import queue
import re
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode, get_cfg
from PIL import Image

from visft import add_visft_config
from visft.data import ViSFTMapper, register_own_data
from visft.data.headers import ImageRules
from visft.data.loader import TrainLoader, load_records
from visft.data.workers import num_workers

DISTINCT, IN_A_SHARD = 64, 1024


def write_shards(folder: Path, images: int, side: int) -> None:
    """Write smooth random images, whose files have about the size of photographs' (0.15 bytes a pixel)."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    for shard in range(math.ceil(images / IN_A_SHARD)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * IN_A_SHARD, min(images, (shard + 1) * IN_A_SHARD)):
                caption = f"image number {number} of {images}, without any meaning".encode()
                for name, content in (("jpg", files[number % DISTINCT]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def build_config(file: str, words: list[str]) -> CfgNode:
    cfg = get_cfg()
    add_visft_config(cfg)
    if file:
        cfg.merge_from_file(file)
    cfg.merge_from_list(words)
    register_own_data(cfg)
    return cfg


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])


def processor_time(pid: int) -> float:
    """Return the seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_ready(loader: TrainLoader) -> bool:
    """Whether the next batch is in the queue of PyTorch's DataLoader, which has no public way to ask."""
    batches = loader._batches
    arrived_early = len(batches._task_info.get(batches._rcvd_idx, ())) == 2
    return arrived_early or not batches._data_queue.empty()


def consume(rank: int, args: argparse.Namespace, words: list[str], started, results) -> None:
    """Run one consumer and put its figures into the queue `results`."""
    cfg = build_config(args.config_file, words)
    records = load_records(
        tuple(cfg.DATASETS.TRAIN),
        train=True,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        rules=ImageRules.of(cfg),
    )
    loader = TrainLoader(
        records,
        ViSFTMapper(cfg, is_train=True),
        batch_size=args.batch * args.consumers,
        seed=0,
        num_workers=num_workers(cfg),
        skip_broken=cfg.DATALOADER.SKIP_BROKEN,
        rank=rank,
        world_size=args.consumers,
    )
    next(loader)
    workers = [process.pid for process in multiprocessing.active_children()]
    started.wait()
    steps = math.ceil(len(records) / (args.batch * args.consumers))
    computed, began, fetches = sum(map(processor_time, workers)), time.perf_counter(), []
    memory = [[pss(pid) for pid in workers]]
    for _ in range(args.epochs):
        for _ in range(steps):
            there, asked = is_ready(loader), time.perf_counter()
            next(loader)
            fetches.append((not there, time.perf_counter() - asked))
            time.sleep(args.step)
        memory.append([pss(pid) for pid in workers])
    seconds, computed = time.perf_counter() - began, sum(map(processor_time, workers)) - computed
    results.put(
        {
            "fetches": fetches,
            "memory": memory,
            "seconds": seconds,
            "computed": computed,
            "workers": len(workers),
        }
    )
    started.wait()  # ends with the others, so that their memory is shared with it until then


def measure(args: argparse.Namespace, words: list[str]) -> dict:
    context = multiprocessing.get_context("spawn")
    started, results = context.Barrier(args.consumers), context.Queue()
    consumers = [
        context.Process(target=consume, args=(rank, args, words, started, results))
        for rank in range(args.consumers)
    ]
    for consumer in consumers:
        consumer.start()
    found = []
    try:
        while len(found) < args.consumers:
            try:
                found.append(results.get(timeout=1))
            except queue.Empty:
                if any(consumer.exitcode for consumer in consumers):
                    raise SystemExit("a consumer failed; see its message above") from None
        for consumer in consumers:
            consumer.join()
    finally:
        for consumer in consumers:
            consumer.terminate()
    waited, times = np.concatenate([one["fetches"] for one in found]).T
    images = args.batch * len(times)
    seconds = max(one["seconds"] for one in found)
    cpu = sum(one["computed"] for one in found) / images
    memory = np.mean([one["memory"] for one in found], axis=(0, 2)) / 2**20
    return {
        "consumers": args.consumers,
        "workers": sum(one["workers"] for one in found),
        "batch": args.batch,
        "step_s": args.step,
        "images": images,
        "seconds": round(seconds, 1),
        "images_per_s": round(images / seconds, 1),
        "steps_that_waited": round(float(waited.mean()), 4),
        "fetch_ms": [round(1000 * float(t), 1) for t in np.percentile(times, (50, 90, 99, 100))],
        "cpu_ms_per_image": round(1000 * cpu, 2),
        "images_per_s_of_a_worker": round(1 / cpu, 1),
        "workers_needed": round(args.consumers * args.batch / args.step * cpu, 2) if args.step else None,
        "worker_mib": [round(float(m), 1) for m in memory],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="")
    parser.add_argument("--consumers", type=int, default=8)
    parser.add_argument(
        "--step", type=float, required=True, help="seconds that a step takes without the loader"
    )
    parser.add_argument("--batch", type=int, default=4, help="images in a step of a consumer")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--synthetic", type=int, default=0, metavar="IMAGES")
    parser.add_argument("--side", type=int, default=384, help="of synthetic images, in pixels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="visft-shards-") as folder:
        words, indexed = list(args.opts), {}
        if args.synthetic:
            write_shards(Path(folder), args.synthetic, args.side)
            words += ["VISFT.DATA.TRAIN_SHARDS", folder]
            cfg, began = build_config(args.config_file, words), time.perf_counter()
            load_records(tuple(cfg.DATASETS.TRAIN), train=True)
            indexed = {"index_s": round(time.perf_counter() - began, 2)}
        print(json.dumps(measure(args, words) | indexed))


if __name__ == "__main__":
    main()
