"""A whole tiny run through the command line: both stages, evaluation, images, report, export, drawing."""

import json
from pathlib import Path

import numpy as np
import processes
import pytest
import runs
import shapes
from PIL import Image
from tiny_run import tiny_arguments


@pytest.fixture(scope="module")
def finished(shapes_train, shapes_test, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("finished")
    arguments = tiny_arguments(shapes_train, shapes_test, folder / "run")
    arguments += ["VISFT.EXPORT", "('open_clip',)"]
    runs.train(arguments, folder / "log", before=processes.read_exports_here)
    return folder / "run", arguments


def test_files(finished):
    run, _ = finished
    for stage in ("heads", "lora"):
        assert (run / stage / "last_checkpoint").read_text() == "model_0000004.safetensors"
        assert list((run / stage).glob("events.out.tfevents.*"))
        rows = runs.rows(run / stage / "metrics.json")
        assert any("total_loss" in row and "lr" in row for row in rows)
        assert "segmentation/segm/AP50" in rows[-1]
    assert "eta:" in (run / "log.txt").read_text()
    assert (run / "export" / "visft_backbone.safetensors").is_file()
    assert (run / "export" / "open_clip_config.json").is_file()


def test_report_is_the_evaluations(finished):
    run, _ = finished
    report = json.loads((run / "report.json").read_text())
    evaluations = json.loads((run / "run.json").read_text())["evaluations"]
    # Fresh heads: what comes before is the end of stage heads.
    assert set(evaluations) == {"heads", "lora"}
    for key, step in (("before", "heads"), ("after", "lora")):
        assert report[key]["detection/bbox/AP50"] == evaluations[step]["detection/bbox/AP50"]
        assert report[key]["segmentation/segm/AP50"] == evaluations[step]["segmentation/segm/AP50"]
    page = (run / "report.md").read_text()
    assert "loss_curves.png" in page and "predictions/" in page and "| detection/bbox/AP50 |" in page
    assert (run / "loss_curves.png").stat().st_size > 1000


def test_images_show_ground_truth_beside_each_head(finished, shapes_test):
    run, _ = finished
    images = sorted((run / "predictions").glob("*.png"))
    assert len(images) == 4
    sheet = np.asarray(Image.open(images[0]))
    # Three panels (ground truth, detection, segmentation) of an enlarged square, a gap between them.
    side = sheet.shape[0] - 22
    assert side >= 384 and sheet.shape[1] == 3 * side + 8
    plain = np.asarray(Image.open(shapes_test[1] / f"{images[0].stem}.png").resize((side, side), 0))
    assert np.abs(sheet[22:, :side].astype(int) - plain.astype(int)).max() > 50  # something is drawn


def test_predict_draws_images_of_the_users_own(finished, tmp_path):
    """Photos as they come: other sizes than in training, grey ones, other suffixes, and other files in the folder, into
    which the drawings go, too, replacing none of them."""
    run, arguments = finished
    file, images = shapes.make(tmp_path / "own", images=2, size=80, seed=5)
    with Image.open(images / "000001.png") as image:
        image.resize((301, 97)).save(images / "wide.JPG", format="JPEG")
        image.convert("L").resize((33, 90)).save(images / "grey.jpeg")
    file.rename(images / "annotations.json")
    before = {file: file.read_bytes() for file in images.iterdir()}
    options = ["--input", images, "--output", images, "--weights", run, "--threshold", "0.0"]
    command = runs.option(arguments, *map(str, options))
    status, text = processes.run("predict.py", command, tmp_path / "log")
    assert status == 0, text
    assert {file: file.read_bytes() for file in before} == before
    drawn = {file.name for file in images.iterdir()} - {file.name for file in before}
    assert drawn == {"000001_predicted.png", "000002_predicted.png", "grey.png", "wide.png"}
    for name, (width, height) in {"wide": (301, 97), "grey": (33, 90)}.items():
        with Image.open(images / f"{name}.png") as sheet:
            # Two panels (detection, segmentation) of the image, enlarged, under their names.
            assert (sheet.width - 4) / 2 / (sheet.height - 22) == pytest.approx(width / height, rel=0.02)


def test_predict_says_which_image_is_missing(finished, tmp_path):
    _, arguments = finished
    command = runs.option(arguments, "--input", "/nowhere.jpg", "--output", str(tmp_path / "drawn"))
    assert "/nowhere.jpg" in runs.stopped(command, tmp_path / "log", "predict.py")
    assert not (tmp_path / "drawn").exists()


def test_eval_only_gives_the_figures_of_the_run(finished, tmp_path):
    run, arguments = finished
    keys = {"MODEL.WEIGHTS": run, "SEED": 1, "OUTPUT_DIR": tmp_path / "e"}
    runs.train([*runs.option(arguments, "--eval-only"), *runs.words(keys)], tmp_path / "log")
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    expected = json.loads((run / "run.json").read_text())["evaluations"]["lora"]
    assert found == pytest.approx(expected, nan_ok=True)
