"""A run's folder is a model: moved, read-only and without its data it says what the model in training said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import shapes
import torch
from captioned_shapes import SMALL, captioned
from detectron2.structures import Instances
from PIL import Image
from tiny_run import DEMO, tiny_arguments

import visft
from visft.checkpoint import files
from visft.commands import predict, train_net
from visft.data import build_test_mapper
from visft.engine import run_vocabulary, settings, stages
from visft.engine.checks import check
from visft.errors import CheckpointError, ConfigError, DataError

ALL = "('detection', 'segmentation', 'captioning')"
TEXT = ["MODEL.VISFT.HEADS", "('detection', 'region_text')", "MODEL.CLIP_VIT.PRETRAINED", "demo"]

ONE = ["VISFT.SOLVER.HEADS.MAX_ITER", "1", "VISFT.SOLVER.LORA.MAX_ITER", "1"]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file() and file.name != "log.txt"  # this process trained it, and goes on logging
    }


def oracle(words: list[str], output: Path, image: Path, seed: int) -> dict:
    """What the model says that is built from config and data, as before there was anything else."""
    cfg = settings.load_config(DEMO, [*words[2:], "MODEL.WEIGHTS", str(output)])
    check(cfg, train=False)
    model = stages.initial_model(run_vocabulary.with_vocabulary(cfg), seed).eval()
    size = Image.open(image).size
    record = {"file_name": str(image), "height": size[1], "width": size[0]}
    with torch.no_grad():
        return model([build_test_mapper(cfg)(record)])[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on own data, moved and without write permission; its data are gone. What it said before; a test set."""
    home = tmp_path_factory.mktemp("home")
    train, test = captioned(home / "data"), captioned(home / "test", seed=1)
    output = home / "run"
    words = tiny_arguments(train[:2], None, output)
    options = SMALL | {"MODEL.VISFT.HEADS": ALL, "VISFT.DATA.TRAIN_CAPTIONS": train[2], "SEED": -1}
    words += runs.words(options)
    words += ["MODEL.VISFT.DETECTION.LABEL_SPACE", "dataset_id"]
    assert train_net.main([*words, *ONE]) == 0
    image = home / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(image)
    seed = files.read_json(output / "run.json")["seed"]
    expected = oracle(words, output, image, seed)
    shutil.rmtree(home / "data")
    moved = home / "elsewhere" / "model"
    moved.parent.mkdir()
    output.rename(moved)
    for path in [moved, *moved.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    yield moved, image, expected, test, words
    for path in [moved, *moved.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def same(found: Instances, expected: Instances) -> None:
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, expected.pred_masks)
    for field in ("scores", "pred_classes"):
        assert torch.equal(found.get(field), expected.get(field)), field
    assert list(found.pred_class_names) == [shapes.CLASSES[c] for c in expected.pred_classes.tolist()]


@pytest.mark.parametrize("part", [".", "lora", "lora/model_0000001.safetensors"])
def test_it_predicts_what_the_model_in_training_did(trained, part, monkeypatch, tmp_path):
    run, image, expected, _, _ = trained
    before = contents(run)
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    model = visft.load(run / part)
    assert torch.equal(torch.get_rng_state(), state) and model.class_names == shapes.CLASSES
    found = model.predict(str(image))
    same(found, expected["instances"])
    assert found.image_size == (50, 90) and found.caption == expected["caption"]
    assert found.caption.score == expected["caption"].score < 0
    assert torch.equal(found.outputs["detection"].scores, expected["detection"].scores)
    chosen = found[found.scores >= found.scores.median()]
    assert list(chosen.pred_class_names) == [shapes.CLASSES[c] for c in chosen.pred_classes.tolist()]
    assert contents(run) == before and not list(tmp_path.iterdir())


def test_images_are_files_pillows_or_arrays_that_say_their_channels(trained):
    run, image, expected, _, _ = trained
    model = visft.load(str(run))
    with Image.open(image) as picture:
        array = np.array(picture.convert("RGB"))
        for found in (
            model.predict(picture),
            model.predict(array, channels="RGB"),
            model.predict(array[..., ::-1], channels="BGR"),
        ):
            same(found, expected["instances"])
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(array)))
    turned.getexif()[0x0112] = 6  # to be turned clockwise before it is shown
    same(model.predict(turned), expected["instances"])
    for wrong, channels, words in (
        (array, None, "say whether the channels of the array are RGB or BGR"),
        (array / 255, "RGB", r"the array is float64 \[50, 90, 3\]"),
        (str(image), "BGR", "which is for arrays"),
        (3, None, "the image is a int"),
    ):
        with pytest.raises(DataError, match=words):
            model.predict(wrong, channels=channels)


def test_predict_py_needs_neither_config_nor_data(trained, tmp_path, monkeypatch):
    run, image, _, _, _ = trained
    monkeypatch.chdir(tmp_path)
    drawn = []
    for name, options in (("without", []), ("with", ["--config-file", str(run / "config.yaml")])):
        command = ["--weights", str(run), "--input", str(image), "--output", name, *options]
        assert predict.main([*command, "--threshold", "0.0"]) == 0
        drawn.append({path.name: path.read_bytes() for path in Path(name).iterdir()})
    assert drawn[0] == drawn[1] and set(drawn[0]) == {"image.png", "image_words.png"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "MODEL.LORA.RANK is 64, in the run 2"),
        (["MODEL.LORA.ALPHA", "3.0"], "MODEL.LORA.ALPHA is 3.0, in the run 16.0"),
        (["MODEL.VISFT.CAPTIONING.GRID", "7"], "MODEL.VISFT.CAPTIONING.GRID is 7, in the run 4"),
        (["MODEL.PIXEL_MEAN", "(1.0, 2.0, 3.0)"], "MODEL.PIXEL_MEAN and PIXEL_STD are"),
        (["VISFT.DATA.TRAIN_JSON", "OTHER"], "the run learned 3 classes (square, disc, bar), but DATASETS"),
        (["VISFT.DATA.TRAIN_JSON", "/no/where.json"], "/no/where.json is not there"),
    ],
)
def test_a_config_that_disagrees_is_refused(trained, options, words, tmp_path, capsys):
    run, image, _, test, _ = trained
    other = json.loads(test[0].read_text())
    other["categories"][0]["name"] = "moon"
    (tmp_path / "other.json").write_text(json.dumps(other))
    options = [str(tmp_path / "other.json") if word == "OTHER" else word for word in options]
    if "VISFT.DATA.TRAIN_JSON" in options:
        options += ["VISFT.DATA.TRAIN_IMAGES", str(test[1])]
    config = DEMO if not options else str(run / "config.yaml")
    command = ["--weights", str(run), "--input", str(image), "--output", str(tmp_path / "out")]
    assert predict.main([*command, "--config-file", config, *options]) == 1
    said = capsys.readouterr().err
    assert words in said and "Leave --config-file out" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_it_is_evaluated_on_a_test_set_whose_classes_are_matched_by_name(trained, tmp_path, capsys):
    run, _, _, test, words = trained
    content = json.loads(test[0].read_text())
    ids = {category["id"]: 100 - category["id"] for category in content["categories"]}
    for entry in content["categories"]:
        entry["id"] = ids[entry["id"]]
    for entry in content["annotations"]:
        entry["category_id"] = ids[entry["category_id"]]
    renumbered = tmp_path / "renumbered.json"
    renumbered.write_text(json.dumps(content))
    figures = []
    for file in (test[0], renumbered):
        data = {"TEST_JSON": file, "TEST_IMAGES": test[1], "TEST_CAPTIONS": test[2]}
        keys = [str(word) for key, value in data.items() for word in (f"VISFT.DATA.{key}", value)]
        folder = tmp_path / file.stem
        assert train_net.main(["--eval-only", "--weights", str(run), *keys, "OUTPUT_DIR", str(folder)]) == 0
        figures.append(files.read_json(folder / "evaluation.json"))
    assert figures[0] == pytest.approx(figures[1]) and "segmentation/segm/AP-disc" in figures[0]
    assert "captioning/CIDEr" in figures[0]
    content["categories"][1]["name"] = "moon"
    renumbered.write_text(json.dumps(content))
    assert train_net.main(["--eval-only", "--weights", str(run), *keys]) == 1
    assert "the 3 that the heads learned (square, disc, bar): it has moon" in capsys.readouterr().err


def test_heads_that_a_run_does_not_train_are_kept_with_it(shapes_train, tmp_path):
    """Stage lora alone, through heads of another run and the text encoder: what it starts from may go."""
    first, second = tmp_path / "first", tmp_path / "second"
    words = [*tiny_arguments(shapes_train, None, first), "VISFT.STAGES", "('heads',)", *TEXT]
    words += ["MODEL.VISFT.REGION_TEXT.PROMPTS", "('a drawing of a {}',)"]
    words += ONE
    assert train_net.main(words) == 0
    options = ["OUTPUT_DIR", str(second), "VISFT.STAGES", "('lora',)"]
    options += ["MODEL.VISFT.HEAD_FILES", f"('{first}',)"]
    assert train_net.main([*words, *options]) == 0
    image = sorted(shapes_train[1].iterdir())[0]
    expected = oracle([*words, *options], second, image, 1)
    shutil.rmtree(first)
    found = visft.load(second).predict(image)
    assert torch.equal(found.scores, expected["instances"].scores) and len(found)
    assert found.caption is None
    boxes = found.pred_boxes
    logits = found.outputs["region_text"].logits(boxes)
    assert torch.equal(logits, expected["region_text"].logits(boxes)) and logits.shape[1] == 3


def test_what_is_no_model_says_so(trained, tmp_path):
    run = trained[0]
    alone = tmp_path / "alone.safetensors"
    shutil.copy(run / "lora" / "model_0000001.safetensors", alone)
    with pytest.raises(CheckpointError, match="without the heads .detection, segmentation, captioning"):
        visft.load(alone)
    metadata = files.read_metadata(alone)
    for name, change, words in (
        ("old", {}, "does not say which config and classes it was trained with"),
        ("new", {"visft_model": '{"version": 2}'}, "was written by a newer visft"),
        ("broken", {"visft_model": '{"version"'}, "cannot be read"),
    ):
        file = tmp_path / f"{name}.safetensors"
        kept = {key: value for key, value in metadata.items() if key != "visft_model"}
        files.write_safetensors(file, files.read_tensors(alone), kept | change)
        with pytest.raises(CheckpointError, match=words):
            visft.load(file)
    with pytest.raises(CheckpointError, match="no whole checkpoint in this folder"):
        visft.load(tmp_path)
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        visft.load(run, device="cuda")
