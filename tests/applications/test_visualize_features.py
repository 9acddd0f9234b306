"""tools/visualize_features.py on two small images: its files, its names and what it refuses."""

import numpy as np
import processes
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from visft.applications import visualize_features
from visft.checkpoint import files
from visft.commands import visualize_features as command
from visft.utils.output_names import names_beside, output_names

BASE = ["--model", "visft-tiny", "--pretrained", "demo"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two images, a tuned tower, and one without its text encoder."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for name, size in (("first.png", (40, 60, 3)), ("second.png", (64, 64, 3))):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / name)
    tensors = files.read_tensors(demo_tower.WEIGHTS_FILE)
    tensors = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    tensors["visual.proj"] = tensors["visual.proj"] + 0.1 * torch.randn(tensors["visual.proj"].shape)
    files.write_safetensors(folder / "tuned.safetensors", tensors)
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    files.write_safetensors(folder / "tower.safetensors", tower)
    return folder


def refused(capsys, *args) -> str:
    assert command.main([*BASE, *map(str, args)]) == 1
    return capsys.readouterr().err


def test_command_draws_every_kind_of_sheet(place, tmp_path):
    command = [*BASE, "--compare", str(place / "tuned.safetensors"), "--texts", "a fox, a rocket"]
    images = [str(place / "first.png"), str(place / "second.png")]
    command += ["--input", *images, "--output", str(tmp_path / "out")]
    status, shown = processes.run("visualize_features.py", command, tmp_path / "log")
    assert status == 0, shown
    kinds = ("features", "texts")
    names = {f"{stem}_{kind}.png" for stem in ("first", "second") for kind in kinds} | {"matches.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(name in shown for name in names)
    for name in names:
        sheet = np.asarray(Image.open(tmp_path / "out" / name))
        assert sheet.shape[1] > 900 and sheet.std() > 20
    # Features are untouched by a projection, so both towers' colours are the same; similarities are not.
    sheet = np.asarray(Image.open(tmp_path / "out" / "second_features.png"))
    base, tuned = (sheet[40:340, 8 + 328 * i + 10 : 8 + 328 * i + 300] for i in (1, 2))
    assert (base == tuned).all()
    sheet = np.asarray(Image.open(tmp_path / "out" / "second_texts.png"))
    base, tuned = (sheet[60:360, 8 + 328 * i + 10 : 8 + 328 * i + 300] for i in (1, 2))
    assert not (base == tuned).all()


def test_one_tower_and_one_image_need_neither_texts_nor_matches(place, tmp_path):
    done = command.main([*BASE, "--input", str(place / "first.png"), "--output", str(tmp_path)])
    assert done == 0 and [path.name for path in tmp_path.iterdir()] == ["first_features.png"]


def test_side_is_the_longer_one_in_whole_patches():
    image = np.zeros((40, 100, 3), np.uint8)
    assert visualize_features._sized(image, 128, 8).shape == (48, 128, 3)


def test_names_tell_files_of_one_stem_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.png", "b/x.jpg", "c/y.png", "X.png")]
    found = output_names(paths)
    assert found[3] == "y" and len({name.lower() for name in found}) == 5
    assert all(name.startswith(("a_x", "b_x", "x", "X", "y")) or "_x" in name.lower() for name in found)
    # A file that is called as another's new name would be.
    clash = output_names([tmp_path / name for name in ("a_x.png.png", "a/x.png", "b/x.png")])
    assert len(set(clash)) == 3


def test_errors_say_what_to_do(place, tmp_path, capsys):
    image = ("--input", place / "first.png", "--output", tmp_path / "out")
    assert "there is no such file" in refused(capsys, "--input", place / "third.png")
    assert "nearest name is 'visft-tiny'" in refused(capsys, *image, "--model", "vist-tiny")
    error = refused(capsys, *image, "--model", "RN50", "--pretrained", "openai")
    assert "--model" in error and "ModifiedResNet" in error
    assert "give 64" in refused(capsys, *image, "--side", "61")
    assert "--texts" in refused(capsys, *image, "--texts", " , ")
    assert "--templates" in refused(capsys, *image, "--texts", "a fox", "--templates", "a photo")
    error = refused(capsys, *image, "--compare", place / "tower.safetensors", "--texts", "a fox")
    assert "tower.safetensors: holds a vision tower without a text encoder" in error
    (tmp_path / "file").write_text("")
    error = refused(capsys, "--input", place / "first.png", "--output", tmp_path / "file")
    assert "is a file, a folder was expected" in error
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert f"--input {broken}" in refused(capsys, "--input", broken, "--output", tmp_path / "out")
    heads = tmp_path / "heads.safetensors"
    files.write_safetensors(heads, {"heads.weight": torch.zeros(1)})
    assert "holds no whole CLIP" in refused(capsys, *image, "--compare", heads)
    assert not (tmp_path / "out").exists()


def test_no_image_of_the_input_is_replaced(place, tmp_path, capsys):
    for name in ("x.png", "x_features.png"):
        Image.open(place / "first.png").save(tmp_path / name)
    before = (tmp_path / "x_features.png").read_bytes()
    error = refused(capsys, "--input", tmp_path, "--output", tmp_path)
    assert "x_features.png would replace an image of --input" in error
    assert (tmp_path / "x_features.png").read_bytes() == before


def test_no_output_replaces_an_image_or_another_output(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "b_words.jpg")]
    endings = (".png", "_words.png")
    assert names_beside(paths, tmp_path, endings) == ["a_predicted", "b", "b_words_predicted"]
    assert names_beside(paths, tmp_path / "out", endings) == ["a", "b", "b_words_predicted"]
