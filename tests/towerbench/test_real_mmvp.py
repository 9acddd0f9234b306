"""MMVP-VLM, on a tiny copy of its true layout."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from towerbench.errors import DataError
from towerbench.real import mmvp

TYPES = ("Orientation", "Camera Perspective")


def write(root: Path) -> Path:
    """Two patterns of two pairs each."""
    rows = [[number, TYPES[(number - 1) // 4], f'the thing, "number" {number}'] for number in range(1, 9)]
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


def test_both_choices_of_a_pair_have_to_be_right(tmp_path, of):
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
        benchmark = of(name, tmp_path)
        assert benchmark.items(Said(similar), benchmark.images(0), 0).tolist() == right, name
        assert benchmark.baselines() == {"chance": 0.25} and not benchmark.in_domain


def test_chance_is_a_quarter(tmp_path, of):
    write(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("vqa mmvp-vlm", "vqa mmvp-vlm pictures"):
        benchmark = of(name, tmp_path)
        hits = [
            benchmark.items(Said(torch.randn(8, 8, generator=generator)), benchmark.images(0), 0).mean()
            for _ in range(500)
        ]
        assert abs(np.mean(hits) - 0.25) < 0.05


def test_the_whole_suite(tmp_path, store, of, command):
    write(tmp_path)
    _, rows = command(tmp_path, "vqa mmvp-vlm")
    benchmark, row = of("vqa mmvp-vlm", tmp_path), rows["vqa mmvp-vlm"]
    seen = store.embeddings(benchmark.images(0)["test"])
    right = 0
    for number, pair in enumerate(benchmark.pairs):
        lines = store.tower.text([f"a photo of {text}" for text in pair.statements])
        # As the authors' script has it: the shares of the first image, of either statement.
        share = (100 * lines @ seen[2 * number : 2 * number + 2].T).softmax(1)[:, 0]
        right += bool(share[0] > 0.5 > share[1])
    assert row["n"] == 4 and row["base"] == 25 * right and not row["in_domain"]


def test_a_relative_folder_is_the_same_data(tmp_path, command, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    written = set()
    for folder in ("data", tmp_path / "data"):
        command(folder, "vqa mmvp-vlm")
        [scores] = (tmp_path / "evaluation" / "scores").glob("*/*.safetensors")
        written.add(scores.stat().st_mtime_ns)
    assert len(written) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,Text,a\n2,Text,b\n3,Text,c\n", "question 3 .Text. is followed by nothing"),
        ("1,Text,a\n4,Text,d\n", r"question 1 .Text. is followed by \(4, 'Text'\)"),
        ("1,Text,a\n2,Text,\n", "a line is"),
        ("", "has no question"),
    ],
)
def test_broken_files_are_refused(tmp_path, rows, message):
    for head, expected in (("ID,Type,Statement\n", message), ("1,Text,a\n", "its first line is")):
        (tmp_path / "Questions.csv").write_text(head + rows)
        with pytest.raises(DataError, match=expected):
            mmvp.pairs.__wrapped__(tmp_path)


def test_an_image_that_is_not_there_is_named(tmp_path, of, caplog):
    next(write(tmp_path).rglob("4.jpg")).unlink()
    with pytest.raises(DataError, match="4.jpg: there is no such file"):
        of("vqa mmvp-vlm", tmp_path).images(0)
    assert "4 pairs, and MMVP-VLM 135" in caplog.text
