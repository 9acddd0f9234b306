"""MMVP-VLM, on a tiny copy of its true layout."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from towerbench import Context, FeatureStore, Tower, registered
from towerbench import __main__ as evaluate
from towerbench.errors import DataError
from towerbench.real import mmvp

TYPES = ("Orientation", "Camera Perspective")


def write(root: Path, rows=None) -> Path:
    """Two patterns of two pairs each."""
    rows = rows or [
        [number, TYPES[(number - 1) // 4], f'the thing, "number" {number}'] for number in range(1, 9)
    ]
    folder = root / "MMVP_VLM"
    for number, kind, _ in rows:
        file = folder / "MLLM_VLM Images" / kind / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([["Question ID", "Type", "Statement"], *rows])
    return folder


class Said:
    """A tower whose images and statements are given."""

    def __init__(self, similar):
        # Images are the axes of a space, so that a statement's coordinates are its similarities.
        self.images, self.lines = torch.eye(similar.shape[0]), similar.T

    def embeddings(self, images):
        return self.images

    def text(self, lines):
        assert len(lines) == len(self.lines) and lines[0] == 'a photo of the thing, "number" 1'
        return self.lines


def test_pairs_are_read_in_order(tmp_path):
    found = mmvp.pairs(write(tmp_path))
    assert len(found) == 4 and found[0].statements == ('the thing, "number" 1', 'the thing, "number" 2')
    assert [file.name for pair in found for file in pair.files] == [f"{n}.jpg" for n in range(1, 9)]
    assert found[3].files[0].parent.name == "Camera Perspective"


def test_both_choices_of_a_pair_have_to_be_right(tmp_path):
    write(tmp_path)
    similar = torch.full((8, 8), 9.0)  # what other pairs say does not count
    pairs = ([[3, 1], [2, 4]], [[3, 2], [4, 5]], [[3, 4], [2, 5]], [[3, 3], [2, 5]])  # [image, statement]
    for place, block in enumerate(pairs):
        similar[2 * place : 2 * place + 2, 2 * place : 2 * place + 2] = torch.tensor(block)
    expected = {
        # The second pair's first statement is nearer to the second image: 4 > 3.
        "vqa mmvp-vlm": [True, False, True, True],
        # The third pair's first image is nearer to the second statement; the fourth's is as near to both.
        "vqa mmvp-vlm pictures": [True, True, False, False],
    }
    for name, right in expected.items():
        benchmark = registered()[name](Context(data=tmp_path))
        assert benchmark.items(Said(similar), benchmark.images(0), 0).tolist() == right, name
        assert benchmark.baselines() == {"chance": 0.25} and not benchmark.in_domain


def test_chance_is_a_quarter(tmp_path):
    write(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("vqa mmvp-vlm", "vqa mmvp-vlm pictures"):
        benchmark = registered()[name](Context(data=tmp_path))
        hits = [
            benchmark.items(Said(torch.randn(8, 8, generator=generator)), benchmark.images(0), 0).mean()
            for _ in range(500)
        ]
        assert abs(np.mean(hits) - 0.25) < 0.05


def test_the_whole_suite(tmp_path):
    write(tmp_path)
    arguments = [
        "--model",
        demo_tower.NAME,
        "--pretrained",
        "demo",
        "--data",
        str(tmp_path),
        "--seeds",
        "1",
    ]
    out = tmp_path / "out"
    assert evaluate.main([*arguments, "--suite", "vqa mmvp-vlm", "--output", str(out)]) == 0
    (row,) = json.loads((out / "results.json").read_text())["families"]
    benchmark = registered()["vqa mmvp-vlm"](Context(data=tmp_path))
    store = FeatureStore(Tower.load(demo_tower.NAME, "demo", device="cpu"))
    seen = store.embeddings(benchmark.images(0)["test"])
    right = 0
    for number, pair in enumerate(benchmark.pairs):
        lines = store.tower.text([f"a photo of {text}" for text in pair.statements])
        # As the authors' script has it: the shares of the first image, of either statement.
        share = (100 * lines @ seen[2 * number : 2 * number + 2].T).softmax(1)[:, 0]
        right += bool(share[0] > 0.5 > share[1])
    store.close()
    assert row["n"] == 4 and row["base"] == 25 * right and not row["in_domain"]


def test_a_relative_folder_is_the_same_data(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", demo_tower.NAME, "--pretrained", "demo", "--suite", "vqa mmvp-vlm"]
    for folder in ("data", str(tmp_path / "data")):
        assert evaluate.main([*arguments, "--data", folder, "--output", "out"]) == 0
        [scores] = (tmp_path / "out" / "scores").glob("*/*.safetensors")
        if folder == "data":
            written = scores.stat().st_mtime_ns
    assert scores.stat().st_mtime_ns == written


def test_broken_files_are_refused(tmp_path, caplog):
    rows = [[1, "Text", "a"], [2, "Text", "b"], [3, "Text", "c"], [4, "Text", "d"]]

    def fails(match, changed):
        mmvp.pairs.cache_clear()
        folder = write(tmp_path, changed)
        with pytest.raises(DataError, match=match):
            mmvp.pairs(folder)

    fails("question 3 .Text. is followed by nothing", rows[:3])
    fails(r"question 1 .Text. is followed by \(4, 'Text'\)", [rows[0], rows[3]])
    fails("a line is", [rows[0], [2, "Text", ""]])
    folder = write(tmp_path, rows)
    mmvp.pairs.cache_clear()
    (folder / "MLLM_VLM Images" / "Text" / "4.jpg").unlink()
    benchmark = registered()["vqa mmvp-vlm"](Context(data=tmp_path))
    with pytest.raises(DataError, match="4.jpg: there is no such file"):
        benchmark.images(0)
    assert "2 pairs, and MMVP-VLM 135" in caplog.text
    (folder / "Questions.csv").write_text("1,Text,a\n2,Text,b\n")
    mmvp.pairs.cache_clear()
    with pytest.raises(DataError, match=r"its first line is \[.1., .Text., .a.\]"):
        mmvp.pairs(folder)
    (folder / "Questions.csv").write_text("")
    with pytest.raises(DataError, match="its first line is"):
        mmvp.pairs(folder)
