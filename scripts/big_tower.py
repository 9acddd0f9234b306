#!/usr/bin/env python
"""Measures time and memory of the authors' towers with random weights: the export of a LoRA file, the start of a run
in several processes, and a stage-2 step on the CPU.

    scripts/big_tower.py export --name EVA01-g-14 --folder DIR      5 GB in, 5 GB out (EVA02-E-14-plus: 20 and 20)
    scripts/big_tower.py start --name EVA01-g-14 --folder DIR       5 GB of disk, 10 GB of memory for 2 processes
    scripts/big_tower.py step --name EVA01-g-14 --folder DIR        5 GB of disk, 6 GB of memory (EVA02-E-14-plus: 20
                                                                    and 21; with --dtype bfloat16 10 and 12)

Each prints one line of JSON. DIR must be new or empty. The files written there are removed at the end.
"""

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from visft.checkpoint import files
from visft.data.datasets import demo_world
from visft.modeling.backbone import open_clip_models

ROOT = Path(__file__).resolve().parents[1]
RANK = 64
MEASURED = """
import sys, time
start = time.perf_counter()
{statement}
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print("measured", status, peak, time.perf_counter() - start)
"""
STARTED = """
import ctypes, gc, json, sys, time
import torch
from detectron2.utils import comm
from visft.engine import settings, stage, stages
processes, rank = int(sys.argv[1]), int(sys.argv[2])
cfg = settings.load_config({config!r}, {words!r})
import open_clip, timm
torch.distributed.init_process_group(
    "gloo", init_method="file://{meeting}", rank=rank, world_size=processes
)
comm.create_local_process_group(processes)
comm.synchronize()
def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(key + ":"))
before, start, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
model = stages.initial_model(cfg, 0)
built = time.perf_counter()
stage.share_weights(model)
stages.shard(cfg, model)
seconds = time.perf_counter() - start
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
tower = sum(p.numel() for p in model.backbone.tower.parameters())
found = dict(
    parameters=tower, libraries_gb=before, keeps_gb=resident("VmRSS"), peak_gb=resident("VmHWM"),
    seconds_to_build=built - start, seconds=seconds, seconds_of_cpu=time.process_time() - worked,
)
found["peak_over_kept"] = found["peak_gb"] / found["keeps_gb"]
comm.synchronize()
print(json.dumps({{key: round(value, 3) for key, value in found.items()}}), flush=True)
"""


def draw_base(name: str, path: Path, eva_clip: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """Write a whole CLIP with open_clip's or EVA-CLIP's names, filled with normal numbers times 0.02.

    A few million numbers repeat. Every tensor starts at a different one.
    """
    numbers = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {}
    for i, (key, tensor) in enumerate(open_clip_models.meta_clip(name).state_dict().items()):
        size = tensor.numel()

        def content(count=size, start=7919 * i):
            turned = numbers.roll(-start)
            for done in range(0, count, len(turned)):
                yield turned[: count - done]

        key = key.replace("visual.trunk.", "visual.") if eva_clip else key
        tensors[key] = files.Lazy(dtype, tuple(tensor.shape), content)
    files.write_safetensors(path, tensors, {"format": "pt"})


def draw_lora(name: str, path: Path) -> None:
    """Write a random LoRA of rank 64 in the authors' layout."""
    trunk, generator = open_clip_models.meta_tower(name).trunk, torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(len(trunk.blocks)):
        block = f"visual.blocks.{i}.attn.qkv.lora_"
        tensors[f"{block}A"] = 0.1 * torch.randn(2 * RANK, trunk.embed_dim, generator=generator)
        tensors[f"{block}B"] = 0.1 * torch.randn(2 * trunk.embed_dim, RANK, generator=generator)
    torch.save(tensors, path)


def measured(statement: str) -> tuple[int, float, str]:
    """Run a statement that sets `status` in a new process. Returns peak resident bytes (VmHWM), seconds and output."""
    command = [sys.executable, "-c", MEASURED.format(statement=statement)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^measured (\S+) (\d+) (\S+)$", result.stdout, re.MULTILINE)
    if found is None or found[1] != "0":
        raise SystemExit(f"failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return int(found[2]), float(found[3]), result.stdout


def largest_difference(base: Path, lora: Path, output: Path, eva_clip: bool) -> tuple[float, int]:
    """Return the largest difference of the file from base + (1 / 64) B A in float64, and the number of tensors."""
    factors, worst, count = torch.load(lora, weights_only=True), 0.0, 0
    with safetensors.safe_open(output, "pt") as new, safetensors.safe_open(base, "pt") as old:
        for key in new.keys():
            source = key.replace("visual.trunk.", "visual.") if eva_clip else key
            expected, found, count = old.get_tensor(source), new.get_tensor(key), count + 1
            block = re.fullmatch(r"visual\.trunk\.(blocks\.\d+\.attn\.qkv)\.weight", key)
            if block:
                width, expected = expected.shape[1], expected.double()
                a, b = (factors[f"visual.{block[1]}.lora_{kind}"].double() for kind in "AB")
                expected[:width] += b[:width] @ a[:RANK] / RANK
                expected[2 * width :] += b[width:] @ a[RANK:] / RANK
            worst = max(worst, (found.double() - expected).abs().max().item() if block else 0.0)
            if not block and not torch.equal(found, expected):
                raise SystemExit(f"{key} differs from the base's")
    return worst, count


def export(arguments: argparse.Namespace) -> dict:
    """Write a random base and LoRA file, merge them like tools/export_backbone.py, compare, and load the base."""
    folder = arguments.folder
    drawn, lora, output = (
        folder / "drawn.safetensors",
        folder / "eva_x_lora_5000.pt",
        folder / "out" / "f.safetensors",
    )
    draw_base(arguments.name, drawn, arguments.eva_clip)
    draw_lora(arguments.name, lora)
    base = drawn
    if arguments.pt:
        base = folder / "base.pt"
        torch.save(safetensors.torch.load_file(drawn), base)
    words = ["--weights", lora, "--format", "open_clip", "--output", output]
    words += (["--verify"] if arguments.verify else []) + ["MODEL.CLIP_VIT.PRETRAINED", base]
    peak, seconds, _ = measured(
        f"from visft.commands import export_backbone\nstatus = export_backbone.main({[str(w) for w in words]!r})"
    )
    size = output.stat().st_size
    loaded = load(arguments, base)
    worst, count = largest_difference(drawn, lora, output, arguments.eva_clip)
    return {
        "base": base.suffix,
        "file_gb": round(size / 1e9, 2),
        "tensors": count,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e9, 2),
        "peak_over_file": round(peak / size, 3),
        "largest_difference": worst,
        "loaded_as": arguments.load,
        **loaded,
    }


def load(arguments: argparse.Namespace, base: Path) -> dict:
    """Build the whole CLIP on `meta` and stream in the base's weights, if there is enough memory."""
    dtype = getattr(torch, arguments.load)
    need = base.stat().st_size * dtype.itemsize / 4
    about = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    if int(about["MemAvailable"].split()[0]) * 1024 < 1.2 * need + (2 << 30):
        return {"load": "not tried: too little memory free"}
    peak, seconds, _ = measured(
        "import torch\nfrom visft.modeling.backbone import open_clip_models\n"
        f"open_clip_models.create_clip({arguments.name!r}, {str(base)!r}, {dtype})\nstatus = 0"
    )
    return {"load_seconds": round(seconds, 1), "load_peak_gb": round(peak / 1e9, 2)}


def start(arguments: argparse.Namespace) -> dict:
    """Start stage `lora` with the anchor in gloo processes, up to the model of the first iteration."""
    base = arguments.folder / "base.safetensors"
    draw_base(arguments.name, base)
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.CLIP_VIT.NAME": arguments.name,
        "MODEL.CLIP_VIT.PRETRAINED": base,
        "MODEL.CLIP_VIT.FROZEN_DTYPE": "",
        "MODEL.VISFT.HEADS": (),
        "MODEL.VISFT.OBJECTIVES": ("anchor",),
        "VISFT.STAGES": ("lora",),
        "VISFT.TASK_RATIOS": (),
        "VISFT.STRATEGY": arguments.strategy,
    }
    words = [str(word) for pair in keys.items() for word in pair]
    code = STARTED.format(
        config=str(ROOT / "configs" / "visft_eva_g.yaml"),
        words=words,
        meeting=str(arguments.folder / "meeting"),
    )
    command = [sys.executable, "-c", code, str(arguments.processes)]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(arguments.processes)
    ]
    peaks = [{"RssAnon": 0, "RssFile": 0} for _ in ranks]
    while any(rank.poll() is None for rank in ranks):
        for rank, peak in zip(ranks, peaks, strict=True):
            for key, value in resident(rank.pid).items():
                peak[key] = max(peak[key], value)
        time.sleep(0.02)
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a process failed")
    return {
        "base_gb": round(base.stat().st_size / 1e9, 2),
        "ranks": [
            json.loads(rank.stdout.read().splitlines()[-1])
            | {f"peak_{key}_gb": round(value / 1e9, 2) for key, value in peak.items()}
            for rank, peak in zip(ranks, peaks, strict=True)
        ],
    }


def resident(process: int) -> dict[str, int]:
    """Return the resident bytes of a process: its own memory and mapped files. Empty if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        key: int(line.split()[1]) * 1024
        for line in lines
        for key in ("RssAnon", "RssFile")
        if line.startswith(f"{key}:")
    }


def step(arguments: argparse.Namespace) -> dict:
    """Run a few iterations of stage `lora` of the authors' recipe on the CPU, on one rendered scene each.

    The mode is `joint`: the detection and segmentation heads share one pass. With `--dtype bfloat16` the frozen weights
    are stored in it and the step runs under autocast.
    """
    base, low = arguments.folder / "base.safetensors", "" if arguments.dtype == "float32" else arguments.dtype
    draw_base(arguments.name, base, dtype=getattr(torch, arguments.dtype))
    data = demo_world.make(arguments.folder / "scenes", num_train=8, num_val=2, seed=0)
    keys = {
        "OUTPUT_DIR": arguments.folder / "run",
        "MODEL.DEVICE": "cpu",
        "MODEL.CLIP_VIT.NAME": arguments.name,
        "MODEL.CLIP_VIT.PRETRAINED": base,
        "MODEL.CLIP_VIT.FROZEN_DTYPE": low,
        "MODEL.VISFT.HEADS": ("detection", "segmentation"),
        "VISFT.TASK_MIXING": "joint",
        "VISFT.TASK_RATIOS": (),
        "VISFT.DATA.TRAIN_JSON": data.instances("train"),
        "VISFT.DATA.TRAIN_IMAGES": data.images("train"),
        "DATASETS.TEST": (),
        "INPUT.MASK_FORMAT": "bitmask",
        "VISFT.INPUT.AUGMENTATION": "fixed",
        "VISFT.INPUT.SIZE": arguments.size,
        "DATALOADER.NUM_WORKERS": 0,
        "VISFT.STAGES": ("lora",),
        "VISFT.EXPORT": (),
        "VISFT.SOLVER.LORA.AMP": low,
        "VISFT.SOLVER.LORA.IMS_PER_BATCH": 1,
        "VISFT.SOLVER.LORA.MAX_ITER": arguments.iterations,
        "VISFT.SOLVER.LORA.WARMUP_ITERS": 0,
    }
    words = [
        "--config-file",
        ROOT / "configs" / "visft_eva_g.yaml",
        *[w for pair in keys.items() for w in pair],
    ]
    words = [str(word) for word in words]
    peak, seconds, _ = measured(f"from visft.commands import train_net\nstatus = train_net.main({words!r})")
    metrics = next((arguments.folder / "run").rglob("metrics.json")).read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    times = [line["time"] for line in lines if "time" in line]
    return {
        "pixels": arguments.size,
        "dtype": arguments.dtype,
        "iterations": arguments.iterations,
        "seconds_an_iteration": round(times[-1], 1),
        "losses": [round(loss, 3) for loss in losses],
        "peak_gb": round(peak / 1e9, 2),
        "peak_gib": round(peak / 2**30, 2),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("export", "start", "step"))
    parser.add_argument(
        "--name", default="EVA01-g-14", help="an open_clip architecture with a tower like the authors'"
    )
    parser.add_argument("--folder", type=Path, required=True, help="new or empty, on a disk with space")
    parser.add_argument(
        "--pt",
        action="store_true",
        help="export: write the base as a PyTorch file, too (needs twice the disk space)",
    )
    parser.add_argument("--eva-clip", action="store_true", help="export: use EVA-CLIP's names for the base")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="export: reopen the file in open_clip, which needs memory for the model",
    )
    parser.add_argument("--load", default="bfloat16", help="export: parameter type of the loaded model")
    parser.add_argument(
        "--iterations",
        type=int,
        default=3,
        help="step: number of iterations, at least 3, because the first two are not timed",
    )
    parser.add_argument("--processes", type=int, default=2, help="start: number of processes")
    parser.add_argument(
        "--strategy", choices=("DDP", "FSDP2"), default="DDP", help="start: VISFT.STRATEGY of the processes"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="step: of the base"
    )
    parser.add_argument("--size", type=int, default=224, help="step: side of the images in pixels")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.iterations < 3:
        raise SystemExit(
            f"--iterations {arguments.iterations}: expected at least 3, because the first two are not timed"
        )
    arguments.folder = arguments.folder.absolute()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if any(arguments.folder.iterdir()):
        raise SystemExit(f"--folder {arguments.folder} is not empty; give a new or empty folder")
    begun = time.perf_counter()
    try:
        found = {"export": export, "start": start, "step": step}[arguments.what](arguments)
    finally:
        shutil.rmtree(arguments.folder)
    about = {
        "what": arguments.what,
        "name": arguments.name,
        **found,
        "all_seconds": round(time.perf_counter() - begun),
    }
    about |= {
        "torch": torch.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()),
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main()
