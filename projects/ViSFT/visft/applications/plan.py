"""`tools/train_net.py --plan`: parameters, memory and operations of a run, before it, without weights and data."""

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor

from visft.applications import simulated_step
from visft.checkpoint import files
from visft.data.task_mixing import task_config, task_value
from visft.engine import launch, run_vocabulary
from visft.errors import ConfigError
from visft.modeling.heads.captioning.vocabulary import Vocabulary
from visft.modeling.meta_arch import ViSFT
from visft.utils import mixed_precision

OBJECTS, CAPTION_WORDS, VOCABULARY_WORDS = 20, 12, 10_000
"""What is assumed of the data: objects of an image, words of a caption, and words of a vocabulary that is still to be
built. COCO has 7 objects on an image, 10 words in a caption and, in the authors' vocabulary, 9,490 words."""

_CHECKPOINTING = {True: "tower_with_checkpointing", False: "tower_without_checkpointing"}


def run(args: argparse.Namespace) -> None:
    """Check the config, plan, print the tables of `table`, and write the figures to `--output`.

    Raises:
        VisftError: as before a run, but for what only data or a GPU would tell.
    """
    memories = getattr(args, "gpu_memory", [])
    if any(memory <= 0 for memory in memories):
        raise ConfigError(f"--gpu-memory is {min(memories):g}; expected GiB, above 0")
    cfg = launch.prepare(args)
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        raise ConfigError(
            f"--plan: MODEL.META_ARCHITECTURE is `{cfg.MODEL.META_ARCHITECTURE}`; only runs of ViSFT can be planned"
        )
    found = plan(cfg, processes=launch.processes(args), memories=memories)
    found |= {"config": Path(args.config_file).stem}
    if output := getattr(args, "output", ""):
        files.write_json(output, found)
    print(table(found), flush=True)


def plan(cfg: CfgNode, *, processes: int = 1, memories: Iterable[float] = ()) -> dict:
    """Plan every stage of a run.

    Args:
        cfg: a checked config.
        processes: on all machines.
        memories: GiB for each of which the largest image and batch are sought.

    Returns:
        `tower`, `device`, `processes`, `amp` by stage; `parameters`: by part, their number and how many of them train
        in each stage; `steps`: a row for each stage and task with images, bytes (`frozen`: of the weights that do not
        train, by type) and operations of a step in one process.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = resolved(cfg, Path(folder))
        model = simulated_step.build(cfg)
    rows = []
    for stage in cfg.VISFT.STAGES:
        for task in _tasks(cfg):
            simulate = _Simulation(cfg, model, stage, task, processes)
            if simulate.learns:
                rows.append(simulate.row(tuple(memories)))
    return {
        "tower": cfg.MODEL.CLIP_VIT.NAME,
        "device": cfg.MODEL.DEVICE,
        "processes": processes,
        "amp": {stage: mixed_precision.amp_type(cfg, stage) for stage in cfg.VISFT.STAGES},
        "parameters": _parameters(cfg, model),
        "steps": rows,
    }


def resolved(cfg: CfgNode, folder: Path) -> CfgNode:
    """The config with what only the training's machine and data would tell."""
    cfg = run_vocabulary.with_vocabulary(cfg).clone()
    cfg.defrost()
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        for stage in cfg.VISFT.STAGES:
            solver = cfg.VISFT.SOLVER[stage.upper()]
            solver.AMP = "bfloat16" if solver.AMP == "auto" else solver.AMP
    for name in run_vocabulary.caption_heads(cfg):
        node = cfg.MODEL.VISFT[name.upper()]
        if not node.VOCABULARY:
            node.VOCABULARY = str(folder / run_vocabulary.FILE)
            Vocabulary([f"word{i}" for i in range(VOCABULARY_WORDS)]).write(node.VOCABULARY)
    cfg.freeze()
    return cfg


def _tasks(cfg: CfgNode) -> tuple[str | None, ...]:
    return tuple(cfg.MODEL.VISFT.HEADS) or (None,) if cfg.VISFT.TASK_MIXING == "ratio" else (None,)


def largest_image(cfg: CfgNode, images: int) -> tuple[int, int]:
    """(height, width) of the largest batch that the augmentation gives.

    With `detection`, a batch of one is of an image whose long side lies down. A larger one may also have an upright
    image, and is then padded to a square.
    """
    inp = cfg.VISFT.INPUT
    if inp.AUGMENTATION != "detection":
        return inp.SIZE, inp.SIZE
    long = cfg.INPUT.MAX_SIZE_TRAIN
    return (long if images > 1 else min(max(cfg.INPUT.MIN_SIZE_TRAIN), long)), long


class _Simulation:
    """Steps of one stage and task at any batch and image size."""

    def __init__(self, cfg: CfgNode, model: ViSFT, stage: str, task: str | None, processes: int) -> None:
        self.cfg, self.model, self.stage, self.task = cfg, model, stage, task
        self.solver = cfg.VISFT.SOLVER[stage.upper()]
        own = task_value(cfg, task, "IMS_PER_BATCH") if task else None
        self.images = (own or self.solver.IMS_PER_BATCH) // processes
        self.size = largest_image(task_config(cfg, task) if task else cfg, self.images)
        self.amp = mixed_precision.amp_type(cfg, stage)
        self.gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        heads = [model.heads[task]] if task in model.heads else model.heads.values()
        self.int8 = mixed_precision.frozen_type(cfg) == "int8"
        self.pieces = processes if cfg.VISFT.STRATEGY == "FSDP2" else 1
        self.learns = stage == "lora" or any(head.trainable for head in heads)

    def tower(self, checkpointing: bool) -> int:
        """Bytes that the tower's pass of the config's batch leaves, with or without ACTIVATION_CHECKPOINTING."""
        before = self.model.backbone.activation_checkpointing
        self.model.backbone.activation_checkpointing = checkpointing
        try:
            return simulated_step.tower_activations(
                self.model, self.batch(self.images, self.size), self.amp, self.gpu
            )
        finally:
            self.model.backbone.activation_checkpointing = before

    def batch(self, images: int, size: tuple[int, int]) -> list[dict]:
        """Images of (height, width)."""
        return simulated_step.batch(images, size, objects=OBJECTS, words=CAPTION_WORDS, task=self.task)

    def step(self, images: int, size: tuple[int, int]) -> simulated_step.Step:
        """A step with a batch of images of (height, width)."""
        return simulated_step.simulate(
            self.model,
            self.stage,
            self.solver,
            self.batch(images, size),
            amp=self.amp,
            gpu=self.gpu,
            resident=_resident(self.cfg, self.model, self.gpu),
            heads=self.cfg.VISFT.SOLVER.HEADS,
        )

    @functools.cache  # noqa: B019  it ends with the plan
    def peak(self, images: int, size: tuple[int, int]) -> int:
        """Bytes at most."""
        return self.step(images, size).peak - self.absent()

    def absent(self) -> int:
        """Bytes that a step has less than the simulated one.

        Those of the pieces that other processes have, less two blocks that are gathered at a time. Or half of the
        matrices in int8, which are simulated in bfloat16, less the largest one while it is multiplied.
        """
        if self.int8:
            sizes = [
                _bytes([p]) for block in self.model.backbone.blocks for p in block.parameters() if _low(p)
            ]
            return sum(sizes) // 2 - 2 * max(sizes)
        if self.pieces == 1:
            return 0
        blocks = [[_state(p) for p in block.parameters()] for block in self.model.backbone.blocks]
        weights = max(_bytes(block.parameters()) for block in self.model.backbone.blocks)
        return sum(map(sum, blocks)) * (self.pieces - 1) // self.pieces - 2 * weights

    def row(self, memories: Iterable[float]) -> dict:
        """The figures of the config's own batch and largest image, with checkpointing as it says and the other way."""
        step = self.step(self.images, self.size)
        resident = _resident(self.cfg, self.model, self.gpu)
        inside = {id(p) for block in self.model.backbone.blocks for p in block.parameters()}
        trained, frozen = 0, {}
        for tensor in (*self.model.parameters(), *self.model.buffers(), *(t.detach() for t in resident)):
            own = _bytes([tensor]) // (self.pieces if id(tensor) in inside else 1)
            if tensor.requires_grad:
                trained += own
            elif self.int8 and id(tensor) in inside and _low(tensor):
                frozen["int8"] = frozen.get("int8", 0) + own // 2
            elif tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                frozen[kind] = frozen.get(kind, 0) + own
        found = {
            "stage": self.stage,
            "task": self.task or "joint",
            "images": self.images,
            "size": list(self.size),
            "frozen": frozen,
            "trained": trained,
            "gradients": trained,
            "optimizer": 2 * trained,
            "tower": step.tower,
            "heads": step.heads,
            "peak": step.peak - self.absent(),
            "forward_flop": step.forward,
            "step_flop": step.total,
        }
        if self.stage == "lora":
            now = self.model.backbone.activation_checkpointing
            found |= {_CHECKPOINTING[now]: step.tower, _CHECKPOINTING[not now]: self.tower(not now)}
        return found | {"fits": [self.largest(memory, step) for memory in memories]}

    def largest(self, memory: float, step: simulated_step.Step) -> dict:
        """The largest batch at the config's size, and the largest square image at its batch, that fit in GiB; 0: none.

        Args:
            step: that of the config.
        """
        limit, stride = memory * 2**30, self.model.backbone.stride
        height, width = (-(-side // stride) for side in self.size)
        sides = (2, round((2 * height * width) ** 0.5))  # in cells

        def of_batch(images: int) -> int:
            return self.peak(images, self.size)

        def of_cells(cells: int) -> int:
            side = stride * math.isqrt(cells)
            return self.peak(self.images, (side, side))

        peak = step.peak - self.absent()
        images = largest(of_batch, limit, (1, self.images, 2 * self.images), peak)
        cells = largest(of_cells, limit, (sides[0] ** 2, height * width, sides[1] ** 2), peak)
        return {"memory": memory, "images": int(images), "side": stride * math.isqrt(int(cells))}


def largest(
    peak: Callable[[int], float], limit: float, probes: tuple[int, int, int], at_middle: float
) -> float:
    """The x at which a peak reaches `limit`, by straight lines; 0: the peak at the least probe is above.

    Peaks are the maxima of straight lines. Between two probes the chord is above them, so what it says fits does.
    Beyond the greatest probe the line is continued, the peak is asked there, and the chord to it decides.

    Args:
        probes: the least x, that of the config, and a greater one.
        at_middle: the peak at the middle one.
    """

    def reached(a: float, at_a: float, b: float, at_b: float) -> float:
        return a + (limit - at_a) * (b - a) / (at_b - at_a)

    low, middle, high = probes
    other = high if at_middle <= limit or low == middle else low
    at_other = peak(other)
    x = reached(middle, at_middle, other, at_other)
    if other == high and x > high and (at_end := peak(end := int(x))) > limit:
        x = reached(high, at_other, end, at_end)
    return x if x >= low else 0


def _resident(cfg: CfgNode, model: ViSFT, gpu: bool) -> list[Tensor]:
    """What is in a process's memory besides the model: the text encoder, and a copy of the tower before tuning."""
    found: list[Tensor] = []
    reads_text = any(hasattr(part, "text") for _, part in model.objectives.items())
    if reads_text or not (gpu or cfg.MODEL.CLIP_VIT.PRETRAINED):  # random weights of a whole CLIP are kept
        found += simulated_step.text_encoder(model)
    original = model.objectives._original
    if original is not None and original._copy is not None:
        found += original._copy.parameters()
    return found


def _low(parameter: Tensor) -> bool:
    """Whether a parameter of a block is stored in the frozen weights' type."""
    return parameter.dtype != torch.float32


def _state(parameter: Tensor) -> int:
    """Bytes of a parameter with its gradient and its two momenta, if it trains."""
    return _bytes([parameter]) * (4 if parameter.requires_grad else 1)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _parameters(cfg: CfgNode, model: ViSFT) -> dict[str, dict[str, int]]:
    lora = [p for adapters in model.backbone.adapters for p in adapters.parameters()]
    adapters = {id(p) for p in lora}
    parts = {
        "tower": [p for p in model.backbone.parameters() if id(p) not in adapters],
        "LoRA": lora,
        "text encoder": simulated_step.text_encoder(model),
    }
    parts |= {name: list(head.parameters()) for name, head in model.heads.items()}
    found = {name: {"all": sum(p.numel() for p in part)} for name, part in parts.items()}
    for stage in cfg.VISFT.STAGES:
        model.set_stage(stage)
        for name, part in parts.items():
            trained = 0 if name == "text encoder" else sum(p.numel() for p in part if p.requires_grad)
            found[name][stage] = trained
    return found


def table(found: dict) -> str:
    """The figures of `plan` as text."""
    stages = list(found["amp"])
    amp = ", ".join(f"{stage} {kind or 'float32'}" for stage, kind in found["amp"].items())
    million = [
        [name, *(f"{counts[key] / 1e6:.2f}" for key in ("all", *stages))]
        for name, counts in found["parameters"].items()
    ]
    memory, work, fits = [], [], []
    for row in found["steps"]:
        name = [row["stage"], row["task"], f"{row['images']} x {row['size'][0]} x {row['size'][1]}"]
        parts = [sum(row["frozen"].values())]
        parts += [row[key] for key in ("trained", "gradients", "optimizer", "tower", "heads", "peak")]
        memory.append([*name, *(f"{part / 2**30:.2f}" for part in parts)])
        other = [row.get(_CHECKPOINTING[word]) for word in (True, False)]
        other = ["" if value is None else f"{value / 2**30:.2f}" for value in other]
        work.append([*name, *other, *(f"{row[key] / 1e12:.3g}" for key in ("forward_flop", "step_flop"))])
        for fit in row["fits"]:
            fits.append([*name[:2], f"{fit['memory']:g}", fit["images"] or "none", fit["side"] or "none"])
    kinds = sorted({kind for row in found["steps"] for kind in row["frozen"]})
    texts = [
        f"{found['tower']} on {found['device']}, {found['processes']} process(es); AMP: {amp}; frozen weights in "
        f"{', '.join(kinds)}. Assumed: {OBJECTS} objects an image, captions of {CAPTION_WORDS} words.",
        "Millions of parameters, and of trained ones by stage",
        tabulate(million, ["", "all", *stages], tablefmt="plain", disable_numparse=True),
        "GiB in one process: weights, what the forward pass leaves, and the most at once",
        tabulate(
            memory,
            [
                "stage",
                "task",
                "images",
                "frozen",
                "trained",
                "gradients",
                "optimizer",
                "tower",
                "heads",
                "peak",
            ],
            tablefmt="plain",
            disable_numparse=True,
        ),
        "GiB that the tower leaves with and without ACTIVATION_CHECKPOINTING; 10^12 operations of a pass and of a step",
        tabulate(
            work,
            ["stage", "task", "images", "with", "without", "forward", "step"],
            tablefmt="plain",
            disable_numparse=True,
        ),
    ]
    if fits:
        texts += [
            "The largest that fit, the other as above: images of a process, and side of a square image in pixels",
            tabulate(
                fits, ["stage", "task", "GiB", "images", "side"], tablefmt="plain", disable_numparse=True
            ),
        ]
    return "\n\n".join(texts)
