"""What users get wrong: one sentence that says what to do, before anything is built or written.

All cases go through `launch.prepare`, which `main` calls first; one of each kind also through the command line.
"""

import copy
import json
import os
import pickle
from pathlib import Path

import processes
import pytest
import torch
from detectron2.engine import default_argument_parser
from safetensors.torch import save_file
from tiny_run import DEMO

from visft.engine import launch
from visft.errors import CheckpointError, ConfigError, DataError, VisftError


class RunsCode:
    """Pickled into a file, it makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def prepare(arguments: list[str]):
    return launch.prepare(default_argument_parser().parse_args(arguments))


def refused(arguments: list[str], error: type[VisftError], *words: str) -> str:
    """The arguments are refused with this kind of error, whose one sentence has these words."""
    with pytest.raises(error) as caught:
        prepare(arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "Traceback" not in message and "\n" not in message.strip(), message
    return message


def test_the_tiny_run_itself_is_accepted(tiny):
    assert prepare(tiny).is_frozen()


# key, value, kind of error, words of the message
KEYS = [
    ("MODEL.CLIP_VIT.NAM", "ViT-B-16", ConfigError, "MODEL.CLIP_VIT.NAM", "MODEL.CLIP_VIT.NAME"),
    ("VISFT.SOLVER.HEADS.BASELR", "1", ConfigError, "VISFT.SOLVER.HEADS.BASE_LR"),
    ("MODEL.LORA", "4", ConfigError, "section", "RANK"),
    ("MODEL.LORA.RANK", "four", ConfigError, "MODEL.LORA.RANK", "'four'", "int"),
    ("VISFT.STAGES", "lora", ConfigError, "VISFT.STAGES", "tuple"),
    ("MODEL.DEVICE", "gpu", ConfigError, "MODEL.DEVICE", "gpu", "cpu"),
    ("MODEL.META_ARCHITECTURE", "VisFT", ConfigError, "VisFT", "`ViSFT`"),
    ("MODEL.BACKBONE.NAME", "build_clip_vit", ConfigError, "build_clip_vit_backbone"),
    ("MODEL.BACKBONE.NAME", "build_resnet_backbone", ConfigError, "build_clip_vit_backbone"),
    ("MODEL.CLIP_VIT.NAME", "ViT-B-61", ConfigError, "ViT-B-61", "ViT-B-16"),
    ("MODEL.CLIP_VIT.NAME", "RN50", ConfigError, "plain"),
    ("MODEL.CLIP_VIT.PRETRAINED", "dmeo", ConfigError, "MODEL.CLIP_VIT.PRETRAINED", "demo"),
    ("MODEL.CLIP_VIT.CLASS_TOKEN", "remove", ConfigError, "keep", "drop"),
    ("MODEL.CLIP_VIT.TRAIN", "lore", ConfigError, "`lora`"),
    ("MODEL.CLIP_VIT.FROZEN_DTYPE", "half", ConfigError, "float16"),
    ("MODEL.LORA.TARGETS", "('q', 'values')", ConfigError, "MODEL.LORA.TARGETS", "values", "fc1"),
    ("MODEL.LORA.RANK", "0", ConfigError, "MODEL.LORA.RANK", "at least 1"),
    ("MODEL.VISFT.HEADS", "('detector',)", ConfigError, "detector", "`detection`"),
    ("MODEL.VISFT.HEADS", "()", ConfigError, "MODEL.VISFT.HEADS", "segmentation"),
    ("MODEL.VISFT.DETECTION.HEAD", "DETRHaed", ConfigError, "DETRHaed", "`DETRHead`"),
    ("MODEL.VISFT.DETECTION.LABEL_SPACE", "coco", ConfigError, "contiguous", "dataset_id"),
    ("MODEL.VISFT.LOSS_WEIGHTS", "(1.0,)", ConfigError, "LOSS_WEIGHTS", "2 heads"),
    ("VISFT.STAGES", "('heads', 'loar')", ConfigError, "loar", "`lora`"),
    ("VISFT.STAGES", "('lora', 'heads')", ConfigError, "heads before lora"),
    ("VISFT.EXPORT", "('openclip',)", ConfigError, "openclip", "`open_clip`"),
    ("VISFT.INPUT.AUGMENTATION", "crop", ConfigError, "detection", "lsj", "fixed"),
    ("INPUT.FORMAT", "BGR", ConfigError, "INPUT.FORMAT", "`BGR`", "RGB"),
    ("VISFT.SOLVER.LORA.AMP", "float16", ConfigError, "GPU", "bfloat16"),
    ("VISFT.SOLVER.LORA.MAX_ITER", "0", ConfigError, "VISFT.SOLVER.LORA.MAX_ITER", "at least 1"),
    ("VISFT.DATA.TRAIN_JSON", "", ConfigError, "VISFT.DATA.TRAIN_JSON", "VISFT.DATA.TRAIN_IMAGES"),
    ("VISFT.DATA.TRAIN_JSON", "/nowhere/a.json", DataError, "/nowhere/a.json", "VISFT.DATA.TRAIN_JSON"),
    ("MODEL.WEIGHTS", "/nowhere/model.safetensors", CheckpointError, "MODEL.WEIGHTS", "/nowhere/model"),
    ("MODEL.VISFT.HEAD_FILES", "('/nowhere/h.ckpt',)", CheckpointError, "HEAD_FILES", "/nowhere/h.ckpt"),
    ("MODEL.CLIP_VIT.PRETRAINED", "/nowhere/clip.pt", CheckpointError, "PRETRAINED", "/nowhere/clip.pt"),
]


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [(k, v, e, w) for k, v, e, *w in KEYS],
    ids=[f"{k.rpartition('.')[2]}={v or 'empty'}" for k, v, *_ in KEYS],
)
def test_keys(tiny, tmp_path, key, value, error, words):
    refused([*tiny, key, value], error, *words)
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
    content = copy.deepcopy(json.loads(shapes_train[0].read_text()))
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
    status, text = processes.run(
        "train_net.py", [*tiny, "MODEL.DEVICE", "tpu"], tmp_path / "log", VISFT_DEBUG="1"
    )
    assert status == 1 and "Traceback" in text


def test_losses_that_are_not_finite_stop_the_run(tiny, tmp_path):
    """A rate beyond reason: the message names the images, and no checkpoint holds a number that is none."""
    from safetensors.torch import load_file

    arguments = [*tiny, "VISFT.SOLVER.HEADS.BASE_LR", "1e30", "VISFT.SOLVER.HEADS.CHECKPOINT_PERIOD", "1"]
    status, text = processes.run("train_net.py", arguments, tmp_path / "log", VISFT_DEBUG="")
    error = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(error) == 1 and "Traceback" not in text, text
    assert "stage heads" in error[0] and (".png" in error[0] or "not finite" in error[0]), error
    for file in (tmp_path / "run").rglob("model_*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


def test_an_image_that_does_not_decode_is_named(tiny, tmp_path, shapes_train):
    import shutil

    images = tmp_path / "pictures"
    shutil.copytree(shapes_train[1], images)
    for image in images.iterdir():
        image.write_bytes(image.read_bytes()[:60])
    arguments = [*tiny, "VISFT.DATA.TRAIN_IMAGES", str(images)]
    status, text = processes.run("train_net.py", arguments, tmp_path / "log", VISFT_DEBUG="")
    assert status == 1 and "Traceback" not in text, text
    assert str(images) in text and "SKIP_BROKEN" in text
