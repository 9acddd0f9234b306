"""What users get wrong: one sentence that says what to do, before anything is built or written.

All cases go through `launch.prepare`, which `main` calls first; one of each kind also through the command line.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import processes
import pytest
import runs
import torch
from refusals import prepare, refused
from safetensors.torch import load_file, save_file
from tiny_run import DEMO

from visft.errors import CheckpointError, ConfigError, DataError, VisftError


class RunsCode:
    """Pickled into a file, it makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_the_tiny_run_itself_is_accepted(tiny):
    assert prepare(tiny).is_frozen()


RATIO = ["VISFT.TASK_MIXING", "ratio", "VISFT.TASK_RATIOS", "(0.4, 0.6)"]
TASK = "VISFT.TASKS.DETECTION"
FULL = ["MODEL.VISFT.TUNE", "full"]
LORA = ["VISFT.STAGES", "('lora',)"]
ANCHOR = ["MODEL.VISFT.OBJECTIVES", "('anchor',)"]
EVERY_OBJECTIVE = "('anchor', 'contrastive', 'self_distillation')"
OBJECTIVES_ALONE = [*LORA, "MODEL.VISFT.HEADS", "()", "MODEL.VISFT.OBJECTIVES", EVERY_OBJECTIVE]
TEXT = ["MODEL.VISFT.HEADS", "('region_text',)"]

# Keys with their values, words of the message.
KEYS = [
    (["MODEL.CLIP_VIT.NAM", "ViT-B-16"], "MODEL.CLIP_VIT.NAM", "MODEL.CLIP_VIT.NAME"),
    (["VISFT.SOLVER.HEADS.BASELR", "1"], "VISFT.SOLVER.HEADS.BASE_LR"),
    (["MODEL.LORA", "4"], "section", "RANK"),
    (["MODEL.LORA.RANK", "four"], "MODEL.LORA.RANK", "'four'", "int"),
    (["VISFT.STAGES", "lora"], "VISFT.STAGES", "tuple"),
    (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE", "gpu", "cpu"),
    (["MODEL.META_ARCHITECTURE", "VisFT"], "VisFT", "`ViSFT`"),
    (["MODEL.BACKBONE.NAME", "build_clip_vit"], "build_clip_vit_backbone"),
    (["MODEL.BACKBONE.NAME", "build_resnet_backbone"], "build_clip_vit_backbone"),
    (["MODEL.CLIP_VIT.NAME", "ViT-B-61"], "ViT-B-61", "ViT-B-16"),
    (["MODEL.CLIP_VIT.NAME", "RN50"], "plain"),
    (["MODEL.CLIP_VIT.PRETRAINED", "dmeo"], "MODEL.CLIP_VIT.PRETRAINED", "demo"),
    (["MODEL.CLIP_VIT.CLASS_TOKEN", "remove"], "keep", "drop"),
    (["MODEL.CLIP_VIT.TRAIN", "lore"], "`lora`"),
    (["MODEL.CLIP_VIT.FROZEN_DTYPE", "half"], "float16", "auto"),
    (["MODEL.CLIP_VIT.FROZEN_DTYPE", "bfloat16", "MODEL.CLIP_VIT.TRAIN", "full"], "FROZEN_DTYPE", "'full'"),
    (["MODEL.CLIP_VIT.WINDOW_SIZE", "-1"], "WINDOW_SIZE -1", "or more"),
    (["MODEL.CLIP_VIT.GLOBAL_BLOCKS", "(99,)"], "GLOBAL_BLOCKS has 99", "blocks are 0 to"),
    (["MODEL.CLIP_VIT.MEMORY_BUDGET_GIB", "1"], "MEMORY_BUDGET_GIB is 1.0", "ACTIVATION_CHECKPOINTING True"),
    (["VISFT.SOLVER.LORA.AMP", "half"], "VISFT.SOLVER.LORA.AMP", "bfloat16", "auto"),
    (["MODEL.LORA.TARGETS", "('q', 'values')"], "MODEL.LORA.TARGETS", "values", "fc1"),
    (["MODEL.LORA.RANK", "0"], "MODEL.LORA.RANK", "at least 1"),
    (["MODEL.VISFT.HEADS", "('detector',)"], "detector", "`detection`"),
    (["MODEL.VISFT.HEADS", "()"], "MODEL.VISFT.HEADS", "segmentation"),
    (["MODEL.VISFT.DETECTION.HEAD", "DETRHaed"], "DETRHaed", "`DETRHead`"),
    (["MODEL.VISFT.DETECTION.LABEL_SPACE", "coco"], "contiguous", "dataset_id"),
    (["MODEL.VISFT.LOSS_WEIGHTS", "(1.0,)"], "LOSS_WEIGHTS", "2 heads"),
    (["VISFT.STAGES", "('heads', 'loar')"], "loar", "`lora`"),
    (["VISFT.STAGES", "('lora', 'heads')"], "heads before lora"),
    (["VISFT.EXPORT", "('openclip',)"], "openclip", "`open_clip`"),
    (["VISFT.INPUT.AUGMENTATION", "crop"], "detection", "lsj", "fixed"),
    (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT", "`BGR`", "RGB"),
    (["VISFT.SOLVER.LORA.AMP", "float16"], "GPU", "bfloat16"),
    (["VISFT.SOLVER.LORA.MAX_ITER", "0"], "VISFT.SOLVER.LORA.MAX_ITER", "at least 1"),
    (["VISFT.DATA.TRAIN_JSON", ""], "VISFT.DATA.TRAIN_JSON", "VISFT.DATA.TRAIN_IMAGES"),
    # Tasks in turn.
    ([*RATIO, "VISFT.TASK_MIXING", "ration"], "VISFT.TASK_MIXING", "ration", "`ratio`"),
    (
        [*RATIO, "VISFT.TASK_RATIOS", "(1.0,)"],
        "TASK_RATIOS",
        "1 numbers",
        "2 heads",
        "detection, segmentation",
    ),
    (["VISFT.TASK_RATIOS", "(1.0,)"], "VISFT.TASK_RATIOS has 1 numbers"),
    ([*RATIO, "VISFT.TASK_RATIOS", "(0.5, -0.5)"], "segmentation", "-0.5", "above 0"),
    ([*RATIO, "VISFT.TASK_RATIOS", "(0.0, 1.0)"], "detection", "0.0", "MODEL.VISFT.HEADS"),
    ([*RATIO, "VISFT.TASK_RATIOS", "(0, 0)"], "VISFT.TASK_RATIOS", "above 0"),
    ([*RATIO, "VISFT.TASK_RATIOS", "(float('nan'), 1)"], "VISFT.TASK_RATIOS"),
    ([*RATIO, "VISFT.TASK_RATIOS", "('a', 1)"], "VISFT.TASK_RATIOS", "'a'"),
    ([*RATIO, f"{TASK}.AUGMENTATION", "lsjj"], f"{TASK}.AUGMENTATION", "`lsj`"),
    ([*RATIO, f"{TASK}.IMS_PER_BATCH", "-1"], f"{TASK}.IMS_PER_BATCH", "-1"),
    ([*RATIO, f"{TASK}.MIN_SIZE_TRAIN", "(0,)"], f"{TASK}.MIN_SIZE_TRAIN"),
    ([*RATIO, f"{TASK}.MIN_SIZE_TRAIN", "(64,)"], "MIN_SIZE_TRAIN", "`fixed`", "SIZE"),
    ([*RATIO, f"{TASK}.SIZ", "1"], f"{TASK}.SIZE"),
    ([*RATIO, "MODEL.VISFT.BALANCE_GRADIENTS", "True"], "MODEL.VISFT.BALANCE_GRADIENTS", "joint"),
    # All of the tower, or heads and tower in one stage.
    (["MODEL.VISFT.TUNE", "fulll"], "MODEL.VISFT.TUNE", "`full`"),
    ([*FULL, "MODEL.CLIP_VIT.FROZEN_DTYPE", "bfloat16"], "FROZEN_DTYPE", "bfloat16"),
    ([*FULL, "MODEL.CLIP_VIT.TRAIN", "lora"], "MODEL.CLIP_VIT.TRAIN"),
    ([*FULL, "VISFT.EXPORT", "('peft',)"], "VISFT.EXPORT", "peft", "TUNE"),
    (["MODEL.VISFT.FREEZE_HEADS", "False", "VISFT.SOLVER.LORA.BASE_LR", "0.0"], "BASE_LR", "FREEZE_HEADS"),
    (["MODEL.VISFT.FREEZE_HEADS", "no"], "MODEL.VISFT.FREEZE_HEADS", "bool"),
    # Objectives, beside heads and alone.
    (["MODEL.VISFT.OBJECTIVES", "('anchr',)"], "MODEL.VISFT.OBJECTIVES", "`anchor`"),
    (["MODEL.VISFT.OBJECTIVES", "('anchor', 'anchor')"], "twice"),
    (["MODEL.VISFT.HEADS", "('anchor',)"], "MODEL.VISFT.HEADS", "anchor", "detection"),
    ([*ANCHOR, "MODEL.VISFT.ANCHOR.OBJECTIVE", "Ancho"], "`Anchor`"),
    ([*ANCHOR, "MODEL.VISFT.ANCHOR.WEIGHT", "0.0"], "ANCHOR.WEIGHT"),
    ([*ANCHOR, "MODEL.VISFT.ANCHOR.SIZE", "60"], "ANCHOR.SIZE", "8 pixels"),
    ([*OBJECTIVES_ALONE, "MODEL.VISFT.SELF_DISTILLATION.REGIONS", "gird"], "REGIONS", "`grid`"),
    ([*OBJECTIVES_ALONE, "MODEL.VISFT.SELF_DISTILLATION.GRID", "0"], "SELF_DISTILLATION.GRID"),
    ([*OBJECTIVES_ALONE, "MODEL.VISFT.SELF_DISTILLATION.MAX_REGIONS", "-1"], "MAX_REGIONS"),
    ([*OBJECTIVES_ALONE, "VISFT.STAGES", "('heads', 'lora')"], "VISFT.STAGES", "MODEL.VISFT.HEADS is empty"),
    ([*OBJECTIVES_ALONE, "VISFT.TASK_MIXING", "ratio"], "VISFT.TASK_MIXING", "joint"),
    ([*OBJECTIVES_ALONE, "MODEL.VISFT.BALANCE_GRADIENTS", "True"], "BALANCE_GRADIENTS"),
    ([*OBJECTIVES_ALONE, "MODEL.VISFT.FREEZE_HEADS", "False"], "FREEZE_HEADS"),
    ([*OBJECTIVES_ALONE, "MODEL.VISFT.HEAD_FILES", "('/nowhere',)"], "HEAD_FILES", "()"),
    ([*LORA, "MODEL.VISFT.HEADS", "()"], "MODEL.VISFT.HEADS is empty"),
    # The text encoder as a head.
    (
        [*TEXT, "MODEL.VISFT.REGION_TEXT.PROMPTS", "('a photo',)"],
        "TEXT.PROMPTS has `a photo`",
        "each with one",
    ),
    ([*TEXT, "MODEL.VISFT.REGION_TEXT.PROMPTS", "()"], "MODEL.VISFT.REGION_TEXT.PROMPTS is empty"),
    ([*TEXT, "MODEL.VISFT.REGION_TEXT.REGIONS", "mask"], "MODEL.VISFT.REGION_TEXT.REGIONS", "`masks`"),
    ([*TEXT, "MODEL.VISFT.REGION_TEXT.LOSS", "sigmoit"], "MODEL.VISFT.REGION_TEXT.LOSS", "`sigmoid`"),
    ([*TEXT, "MODEL.VISFT.REGION_TEXT.FED_LOSS_CLASSES", "2"], "FED_LOSS_CLASSES", "class_image_count"),
]
DATA = [
    (["VISFT.DATA.TRAIN_JSON", "/nowhere/a.json"], "/nowhere/a.json", "VISFT.DATA.TRAIN_JSON"),
    (OBJECTIVES_ALONE, "contrastive", "VISFT.DATA.TRAIN_CAPTIONS"),
]
WEIGHTS = [
    (["MODEL.WEIGHTS", "/nowhere/model.safetensors"], "MODEL.WEIGHTS", "/nowhere/model"),
    (["MODEL.VISFT.HEAD_FILES", "('/nowhere/h.ckpt',)"], "HEAD_FILES", "/nowhere/h.ckpt"),
    (["MODEL.CLIP_VIT.PRETRAINED", "/nowhere/clip.pt"], "PRETRAINED", "/nowhere/clip.pt"),
]


@pytest.mark.parametrize(
    ("error", "case"),
    [
        pytest.param(error, case, id="=".join(case[0][-2:]))
        for error, cases in ((ConfigError, KEYS), (DataError, DATA), (CheckpointError, WEIGHTS))
        for case in cases
    ],
)
def test_keys(tiny, tmp_path, error, case):
    options, *words = case
    refused([*tiny, *options], error, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tiny):
    refused([*tiny, "MODEL.DEVICE", "cuda"], ConfigError, "MODEL.DEVICE cpu")


def test_coco_is_not_there():
    config = str(Path(DEMO).with_name("visft_eva.yaml"))
    words = ("instances_train2017.json", "DETECTRON2_DATASETS")
    refused(["--config-file", config, "MODEL.DEVICE", "cpu"] + AMP_OFF, DataError, *words)


AMP_OFF = ["VISFT.SOLVER.HEADS.AMP", "", "VISFT.SOLVER.LORA.AMP", ""]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL:\n  CLIP_VIT:\n    NAMES: x\n", ("MODEL.CLIP_VIT.NAMES", "MODEL.CLIP_VIT.NAME")),
        ("MODEL: {CLIP_VTI: {NAME: x}}\n", ("MODEL.CLIP_VTI.NAME", "MODEL.CLIP_VIT.NAME")),
        ("MODEL: [unclosed\n", ("not valid YAML",)),
        ("- a\n- b\n", ("mapping",)),
        ("SEED: !!python/object/apply:os.getpid []\n", ("only plain YAML", "line 1")),
        ("_BASE_: nowhere.yaml\n", ("nowhere.yaml",)),
    ],
    ids=["key", "section", "syntax", "list", "code", "base"],
)
def test_config_files(tmp_path, text, words):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    refused(["--config-file", str(file)], ConfigError, "config.yaml", *words)


def test_command_line(tiny):
    refused(["--config-file", "/nowhere.yaml"], ConfigError, "/nowhere.yaml")
    refused([*tiny, "SEED"], ConfigError, "SEED", "no value")
    refused([*tiny, "--resume", "SEED"], ConfigError, "--resume", "before")
    refused(["SEED", "1"], ConfigError, "--config-file")
    refused(["--num-gpus", "3", *tiny], ConfigError, "IMS_PER_BATCH", "3 processes")
    task = ["--num-gpus", "2", *tiny, *RATIO, f"{TASK}.IMS_PER_BATCH", "3"]
    refused(task, ConfigError, f"{TASK}.IMS_PER_BATCH is 3, which 2 processes")


def test_order_of_checks(tiny):
    """Keys, device, names (also of later stages), data sets, weight files: the first that is wrong is named."""
    wrong = [
        ("MODEL.WEIGHTS", "/nowhere.safetensors", "MODEL.WEIGHTS"),
        ("VISFT.DATA.TRAIN_JSON", "/nowhere.json", "/nowhere.json"),
        ("MODEL.LORA.TARGETS", "('x',)", "MODEL.LORA.TARGETS"),
        ("MODEL.DEVICE", "tpu", "MODEL.DEVICE"),
        ("MODEL.NAME", "x", "MODEL.NAME"),
    ]
    arguments = list(tiny)
    for key, value, expected in wrong:
        arguments += [key, value]
        refused(arguments, VisftError, expected)


# Weight files


def _weights(path: Path, kind: str, marker: Path) -> None:
    whole = {"heads.detection.a": torch.zeros(64)}
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(whole, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickle with code":
        path.write_bytes(pickle.dumps({"model": RunsCode(marker)}))
    elif kind == "torch file with code":
        torch.save({"model": RunsCode(marker)}, path)
    elif kind == "truncated safetensors":
        save_file(whole, path)
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "another tower":
        about = {"stage": "heads", "base": {"name": "ViT-L-14", "pretrained": "openai", "sha256": "0" * 64}}
        save_file(whole, path, {"visft": json.dumps(about)})
    elif kind == "no heads":
        save_file({"fc.weight": torch.zeros(2)}, path)


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "MODEL.VISFT.HEAD_FILES"])
@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("empty", "empty"),
        ("truncated", "cut off"),
        ("truncated safetensors", "cut off"),
        ("pickle with code", "run code"),
        ("torch file with code", "run code"),
        ("another tower", "ViT-L-14"),
        ("no heads", "fc.weight"),
    ],
)
def test_weight_files(tiny, tmp_path, key, kind, word):
    file = tmp_path / (
        "w.safetensors" if kind in ("truncated safetensors", "another tower", "no heads") else "w.pth"
    )
    _weights(file, kind, tmp_path / "was here")
    value = str(file) if key == "MODEL.WEIGHTS" else f"('{file}',)"
    refused([*tiny, key, value], CheckpointError, key, file.name, word)
    assert not (tmp_path / "was here").exists()


# Annotations

BROKEN = {
    "box outside": (lambda a: a["annotations"][2].update(bbox=[50, 50, 40, 4]), "3"),
    "box without area": (lambda a: a["annotations"][2].update(bbox=[5, 5, 0, 4]), "3"),
    "mask that does not decode": (
        lambda a: a["annotations"][2].update(segmentation={"size": [64, 64], "counts": "!!"}),
        "3",
    ),
    "unknown category": (lambda a: a["annotations"][2].update(category_id=77), "77"),
    "unknown picture": (lambda a: a["annotations"][2].update(image_id=999), "999"),
    "no categories": (lambda a: a.pop("categories"), "categories"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_annotations(tiny, tmp_path, shapes_train, case):
    change, word = BROKEN[case]
    content = json.loads(shapes_train[0].read_text())
    change(content)
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(content))
    refused([*tiny, "VISFT.DATA.TRAIN_JSON", str(file)], DataError, "broken.json", word)


def test_annotations_that_are_no_json(tiny, tmp_path):
    file = tmp_path / "broken.json"
    file.write_text('{"images": [')
    refused([*tiny, "VISFT.DATA.TRAIN_JSON", str(file)], DataError, "broken.json")


# The command line: exit status 1, one line, nothing written


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("MODEL.LORA.RANKS", "4", "MODEL.LORA.RANK"),
        ("MODEL.DEVICE", "tpu", "MODEL.DEVICE"),
        ("MODEL.CLIP_VIT.NAME", "ViT-B-61", "ViT-B-16"),
        ("VISFT.DATA.TRAIN_JSON", "/nowhere/a.json", "/nowhere/a.json"),
        ("MODEL.WEIGHTS", "/nowhere/a.safetensors", "/nowhere/a.safetensors"),
    ],
    ids=["key", "device", "name", "data set", "weight file"],
)
def test_each_kind_through_the_command_line(tiny, tmp_path, key, value, word):
    status, text = processes.run("train_net.py", [*tiny, key, value], tmp_path / "log", VISFT_DEBUG="")
    lines = [line for line in text.splitlines() if line.strip()]
    assert status == 1, text
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], text
    assert not (tmp_path / "run").exists()


def test_traceback_on_demand(tiny, tmp_path):
    command = [*tiny, "MODEL.DEVICE", "tpu"]
    status, text = processes.run("train_net.py", command, tmp_path / "log", VISFT_DEBUG="1")
    assert status == 1 and "Traceback" in text


# What stops a run that has begun


def test_losses_that_are_not_finite_stop_the_run(tiny, tmp_path):
    """A rate beyond reason: the message names the images, and no checkpoint holds a number that is none."""
    arguments = [*tiny, "VISFT.SOLVER.HEADS.BASE_LR", "1e30", "VISFT.SOLVER.HEADS.CHECKPOINT_PERIOD", "1"]
    text = runs.stopped(arguments, tmp_path / "log")
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "stage heads" in error and (".png" in error or "not finite" in error), error
    for file in (tmp_path / "run").rglob("model_*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


def test_an_image_that_does_not_decode_is_named(tiny, tmp_path, shapes_train):
    images = tmp_path / "pictures"
    shutil.copytree(shapes_train[1], images)
    for image in images.iterdir():
        image.write_bytes(image.read_bytes()[:60])
    text = runs.stopped([*tiny, "VISFT.DATA.TRAIN_IMAGES", str(images)], tmp_path / "log")
    assert str(images) in text and "SKIP_BROKEN" in text


def test_tasks_in_turn_need_labels_for_each(tiny, tmp_path, shapes_train):
    content = json.loads(shapes_train[0].read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    arguments = [*tiny, *RATIO, "VISFT.DATA.TRAIN_JSON", str(tmp_path / "boxes.json")]
    assert "`segmentation`" in runs.stopped(arguments, tmp_path / "log")
    assert not (tmp_path / "run" / "heads").exists()


def test_boxes_for_an_objective_that_are_not_there(tiny, tmp_path, shapes_captions):
    """Images with captions alone."""
    arguments = [*tiny, *OBJECTIVES_ALONE, "VISFT.DATA.TRAIN_CAPTIONS", str(shapes_captions)]
    arguments += ["VISFT.DATA.TRAIN_JSON", "", "MODEL.VISFT.SELF_DISTILLATION.REGIONS", "boxes"]
    text = runs.stopped(arguments, tmp_path / "log")
    assert "the objective `self_distillation` can learn from none of its" in text
    assert not (tmp_path / "run" / "lora").exists()


@pytest.mark.parametrize("tool", ["benchmark.py", "predict.py"])
def test_what_needs_heads_says_so(tool, tiny, tmp_path):
    own = ["--input", "/nowhere.jpg", "--output", str(tmp_path / "drawn")] if tool == "predict.py" else []
    text = runs.stopped([*runs.option(tiny, *own), *OBJECTIVES_ALONE], tmp_path / "log", tool)
    assert "MODEL.VISFT.HEADS is empty" in text
