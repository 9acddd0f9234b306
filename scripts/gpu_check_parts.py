"""The parts of scripts/gpu_check.py: `gpu_check_parts.py PART DEVICE FILE [--small]` appends rows to a file of JSON."""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from visft.data import build_stage_loader, load_labelled, register_own_data
from visft.data.datasets import demo_world
from visft.engine import settings, stages
from visft.engine.optimizer import build_optimizer
from visft.engine.run_vocabulary import with_vocabulary
from visft.engine.trainer import StageTrainer
from visft.modeling import compiled
from visft.modeling.backbone import CLIPViT, lora, open_clip_models
from visft.modeling.heads import build_head
from visft.modeling.meta_arch import ViSFT
from visft.utils import memory, mixed_precision

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "tests/engine/test_other_device.py": ("same_as_on_the_cpu or goes_back or whole_run", "goes_back"),
    "tests/modeling/backbone/test_on_other_device.py": ("test", "EVA01"),
    "tests/engine/test_amp.py": ("test", "auto"),
    "tests/modeling/heads/test_precision.py": ("test", "DETR"),
}
"""Files, which of their tests run, and which of them in a dry run. Those of the first two use the GPU."""

PUBLISHED = {"B": "A100: 0.314 s, 10.9 GB", "L": "A100: 0.603 s, 20.9 GB"}
TOWERS = {"L": ("ViT-L-14-336", 8), "g": ("EVA01-g-14", 4), "E": ("EVA02-E-14-plus", 2)}
"""Name, and images per batch."""


class Part:
    """What a part is told, and where its rows go."""

    def __init__(self, device: str, file: Path, small: bool) -> None:
        self.device, self.file, self.small = torch.device(device), file, small
        self.cuda = self.device.type == "cuda"
        # The CPU computes in float32; there is nothing to learn from its half precision.
        self.amp = "bfloat16" if self.cuda else ""
        if small:
            compiled.BACKEND = "eager"

    def row(self, what: str, figure: float, unit: str, compare: str = "") -> None:
        """Write a row at once, so that it stays if the part fails later."""
        with open(self.file, "a") as file:
            file.write(
                json.dumps({"what": what, "figure": float(figure), "unit": unit, "compare": compare}) + "\n"
            )

    def timed(self, *steps: Callable[[], object], rounds: int = 7, warm: int = 3) -> list[float]:
        """Median seconds of each step; the steps take turns."""
        rounds, warm = (1, 1) if self.small else (rounds, warm)
        times: list[list[float]] = [[] for _ in steps]
        for number in range(warm + rounds):
            for step, found in zip(steps, times, strict=True):
                self._wait()
                begun = time.perf_counter()
                step()
                self._wait()
                if number >= warm:
                    found.append(time.perf_counter() - begun)
        return [statistics.median(found) for found in times]

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            memory.reset_peak()

    def peak(self) -> float:
        """Peak memory in GiB since `reset_peak`."""
        return (torch.cuda.max_memory_allocated() if self.cuda else memory.peak() or 0) / 2**30


def tests(part: Part) -> None:
    """The tests of devices and precision."""
    environment = {**os.environ, **({"VISFT_TEST_DEVICE": "cuda"} if part.cuda else {})}
    for file, (names, few) in TESTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        command += ["-k", few if part.small else names]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
        part.row(file, counts.get("passed", 0), "passed", f"{counts.get('failed', 0)} failed")
        if done.returncode:
            raise SystemExit(f"{file}: {(done.stdout + done.stderr).splitlines()[-1]}")


def demo_trainer(part: Part, folder: str, device: str, stage: str, amp: str) -> StageTrainer:
    """A stage of the demo with its shipped weights, on a few scenes."""
    data = demo_world.make(f"{folder}/scenes", num_train=16, num_val=2, seed=0)
    keys = {
        "MODEL.DEVICE": device,
        "OUTPUT_DIR": f"{folder}/run",
        "VISFT.DATA.TRAIN_JSON": data.instances("train"),
        "VISFT.DATA.TRAIN_IMAGES": data.images("train"),
        "VISFT.DATA.TRAIN_CAPTIONS": data.captions("train"),
        "VISFT.SOLVER.HEADS.IMS_PER_BATCH": 2 if part.small else 8,
        "VISFT.SOLVER.LORA.IMS_PER_BATCH": 2 if part.small else 8,
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.CLIP_VIT.FROZEN_DTYPE": "",
    }
    cfg = settings.load_config(str(ROOT / "configs" / "visft_demo.yaml"), settings.words(keys))
    register_own_data(cfg)
    cfg = with_vocabulary(cfg, folder)
    model = stages.initial_model(cfg, 1)
    model.set_stage(stage)
    solver = cfg.VISFT.SOLVER[stage.upper()]
    parts = [*model.heads.items(), *model.objectives.items()]
    images = load_labelled(cfg, {name: head.has_labels for name, head in parts})
    batches, optimizer = build_stage_loader(cfg, stage, images, seed=1), build_optimizer(model, solver)
    return StageTrainer(
        model,
        iter(batches),
        optimizer,
        stage=stage,
        clip_norm=solver.CLIP_NORM,
        amp=amp,
        seed=1,
    )


def equal(part: Part) -> None:
    """Losses of both stages on the demo world, against the CPU's in float32."""
    iterations = 2 if part.small else 4
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("heads", "lora"):

            def losses(device: str, amp: str, stage: str = stage) -> list[float]:
                trainer = demo_trainer(part, folder, device, stage, amp)
                trainer.train(0, iterations)
                return [value for value, _ in trainer.storage.history("total_loss").values()]

            expected = losses("cpu", "")
            for amp in ("", "bfloat16", "float16") if part.cuda else ("", "bfloat16"):
                found = losses(part.device.type, amp)
                worst = max(abs(value / there - 1) for value, there in zip(found, expected, strict=True))
                limit = 5e-2 if amp else 1e-3
                what = f"stage {stage}, {amp or 'float32'}: difference of losses from the CPU's"
                part.row(what, worst, "relative", f"at most {limit:g}")
                if not worst <= limit:
                    raise SystemExit(f"{what} is {worst:.2g}, more than {limit:g}")


def scene(side: int, count: int = 7, classes: int = 80) -> dict:
    """A random image with boxes and masks."""
    generator = torch.Generator().manual_seed(side)
    corners = (torch.rand(count, 2, generator=generator) * side * 0.6).floor()
    sizes = (torch.rand(count, 2, generator=generator) * side * 0.3).floor() + 8
    boxes, masks = (
        torch.cat((corners, corners + sizes), dim=1),
        torch.zeros(count, side, side, dtype=torch.bool),
    )
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances = Instances((side, side), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    instances.gt_classes = torch.randint(classes, (count,), generator=generator)
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
    return {"image": image, "height": side, "width": side, "image_id": side, "instances": instances}


def vitdet_model(part: Part, size: str, side: int) -> torch.nn.Module:
    """detectron2's Mask R-CNN on its own ViT, as in projects/ViTDet."""
    model = LazyConfig.load(get_config_file("common/models/mask_rcnn_vitdet.py")).model
    net, windowed = model.backbone.net, None
    net.img_size = model.backbone.square_pad = side
    if part.small:
        model.roi_heads.batch_size_per_image, model.proposal_generator.post_nms_topk = 16, (50, 50)
        net.embed_dim, net.depth, net.num_heads, windowed = 64, 4, 4, (0, 1, 2)
    elif size == "L":
        net.embed_dim, net.depth, net.num_heads, net.drop_path_rate = 1024, 24, 16, 0.4
        windowed = [i for i in range(24) if i % 6 != 5]
    if windowed is not None:
        net.window_block_indexes = list(windowed)
    return instantiate(model)


def clip_model(part: Part, size: str, checkpointing: bool) -> torch.nn.Module:
    """Ours, by configs/mask_rcnn_clip_vit_b16_fpn.yaml."""
    tower = {"B": "ViT-B-16", "L": "ViT-L-14"}[size]
    keys = {
        "MODEL.DEVICE": part.device.type,
        "MODEL.CLIP_VIT.NAME": "visft-tiny" if part.small else tower,
        "MODEL.CLIP_VIT.PRETRAINED": "",
        "MODEL.CLIP_VIT.ACTIVATION_CHECKPOINTING": checkpointing,
        "MODEL.CLIP_VIT.GLOBAL_BLOCKS": (7,)
        if part.small
        else (5, 11, 17, 23)
        if size == "L"
        else (2, 5, 8, 11),
    }
    if part.small:
        keys |= {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50}
    config = ROOT / "configs" / "mask_rcnn_clip_vit_b16_fpn.yaml"
    return build_model(settings.load_config(str(config), settings.words(keys)))


def vitdet(part: Part) -> None:
    """Training of Mask R-CNN on one image of 1024 px: detectron2's ViT and ours."""
    side = 128 if part.small else 1024
    images = [scene(side)]
    for size in ("B", "L"):
        kinds = {
            "detectron2's ViT": lambda size=size: vitdet_model(part, size, side),
            "CLIP": lambda size=size: clip_model(part, size, checkpointing=False),
            "CLIP, checkpointing": lambda size=size: clip_model(part, size, checkpointing=True),
        }
        for kind, build in kinds.items():
            torch.manual_seed(0)
            model = build().to(part.device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            scaler = torch.amp.GradScaler(part.device.type, enabled=part.cuda)

            def step(model=model, optimizer=optimizer, scaler=scaler) -> None:
                optimizer.zero_grad(set_to_none=True)
                with mixed_precision.autocast(part.device, "float16" if part.cuda else ""):
                    loss = sum(model(images).values())
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

            part.reset_peak()
            with EventStorage():
                [seconds] = part.timed(step)
            part.row(f"{size} at {side} px, {kind}: training", seconds, "s per image", PUBLISHED[size])
            part.row(f"{size} at {side} px, {kind}: peak memory", part.peak(), "GiB", PUBLISHED[size])
            del model, optimizer, step


def random_tower(part: Part, name: str) -> torch.nn.Module:
    """A tower with random weights, filled where it will be: on the CPU, billions of numbers take minutes."""
    tower = open_clip_models.meta_tower(name).to_empty(device=part.device)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.1)
        for buffer in tower.buffers():  # the constant bias of EVA's keys
            buffer.zero_()
    return tower


def tuned(part: Part, name: str, checkpointing: bool = False) -> CLIPViT:
    """Such a tower as the authors tune it: LoRA of rank 64 on queries and values."""
    frozen = "bfloat16" if part.cuda else None
    tower = CLIPViT(
        random_tower(part, name),
        frozen_dtype=frozen,
        activation_checkpointing=checkpointing,
        class_token="drop",
    )
    return lora.inject(tower, rank=64)


def stage2(size: str, part: Part) -> None:
    """Stage 2 with the paper's detection and segmentation heads beside a forward pass of the tower."""
    name, count = TOWERS[size]
    name, count, side = ("visft-tiny", 2, 64) if part.small else (name, count, 448)
    cfg = settings.load_config(
        str(ROOT / "configs" / "visft_eva_g.yaml"),
        [*("MODEL.VISFT.SEGMENTATION.NUM_CLASSES", "91"), *("MODEL.VISFT.DETECTION.NUM_CLASSES", "91")],
    )
    images = [scene(side) for _ in range(count)]
    batch = torch.randn(count, 3, side, side, device=part.device)
    backbone = tuned(part, name)
    heads = {h: build_head(cfg, h, backbone.output_shape()) for h in ("detection", "segmentation")}
    model = ViSFT(backbone=backbone, heads=heads, stage="lora", pixel_mean=[123] * 3, pixel_std=[58] * 3)
    model.to(part.device).set_stage("lora")
    optimizer = build_optimizer(model, cfg.VISFT.SOLVER.LORA)

    def forward() -> None:
        with torch.no_grad(), mixed_precision.autocast(part.device, part.amp):
            backbone(batch)

    trainer = StageTrainer(model, iter(()), optimizer, stage="lora", clip_norm=0.1, amp=part.amp)

    def step() -> None:
        trainer.batches = iter([images])
        trainer.run_step()

    variants = [(False, ""), (True, ""), (False, "blocks")]
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        for checkpointing, what in variants:
            backbone.activation_checkpointing = checkpointing
            kind = "checkpointing" if checkpointing else "compiled" if what else "plain"
            with compiled.compiled(model, what):
                part.reset_peak()
                ahead, whole = part.timed(forward, step, rounds=5, warm=2)
            title = f"{name}, {count} images of {side} px, {kind}"
            part.row(f"{title}: stage 2", count / whole, "images/s")
            part.row(f"{title}: forward", count / ahead, "images/s")
            part.row(f"{title}: stage 2 / forward", ahead / whole, "ratio", "limit 0.5, goal 0.42")
            part.row(f"{title}: peak memory", part.peak(), "GiB")


def compile_(part: Part) -> None:
    """A tower of 12 blocks of width 768 with LoRA, with and without VISFT.COMPILE, in turn."""
    name, sides = ("visft-tiny", (64, 96)) if part.small else ("ViT-B-16", (224, 336, 448))
    count, models = 8 if part.cuda else 2, [torch.nn.Module(), torch.nn.Module()]
    for model in models:
        model.backbone, model.heads = tuned(part, name), torch.nn.ModuleDict()

    def step(model: torch.nn.Module, images: torch.Tensor, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            with mixed_precision.autocast(part.device, part.amp):
                features = model.backbone(images)["last_feat"]
            if backward:
                features.float().square().mean().backward()

    with compiled.compiled(models[1], "blocks"):
        for side in sides:
            images = torch.randn(count, 3, side, side, device=part.device)
            for backward in (False, True):
                steps = [functools.partial(step, model, images, backward) for model in models]
                plain, fast = part.timed(*steps, warm=2)
                title = f"{name}, {count} images of {side} px, {'training' if backward else 'forward'}"
                part.row(f"{title}, compiled", fast, "s")
                part.row(f"{title}: time with / without", fast / plain, "ratio")


def kernels(part: Part) -> None:
    """Waits for the device, and kernels, of one iteration of the demo's stages."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA, activity.CPU] if part.cuda else [activity.CPU]
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("heads", "lora"):
            trainer = demo_trainer(part, folder, part.device.type, stage, part.amp)
            with EventStorage(0) as trainer.storage:
                trainer.iter = 0
                trainer.run_step()
                if part.cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    trainer.run_step()
                if part.cuda:
                    torch.cuda.set_sync_debug_mode("default")
                with torch.profiler.profile(activities=kinds) as profile:
                    trainer.run_step()
            events = profile.events()
            if part.cuda:
                waits = sum("synchroniz" in str(entry.message) for entry in caught)
                launched = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
                part.row(
                    f"stage {stage}: waits for the device", waits, "per iteration", "1 and 1 per matching"
                )
                part.row(f"stage {stage}: kernels and copies", launched, "per iteration")
            else:
                reads = sum(e.name == "aten::_local_scalar_dense" for e in events)
                part.row(f"stage {stage}: values read by the program", reads, "per iteration")
                calls = sum(e.name.startswith("aten::") for e in events)
                part.row(f"stage {stage}: operations", calls, "per iteration")


PARTS = {"tests": tests, "equal": equal, "vitdet": vitdet, "compile": compile_, "kernels": kernels}
PARTS |= {f"stage2-{size}": functools.partial(stage2, size) for size in TOWERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("device")
    parser.add_argument("file", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as runs do; part `equal` turns TF32 off
    PARTS[arguments.part](Part(arguments.device, arguments.file, arguments.small))


if __name__ == "__main__":
    main()
