"""scripts/gpu_check.sh without a GPU: every part of its table is there, and says that it means nothing for one."""

import json
import math
import os
import subprocess
import sys

import pytest

PARTS = {"tests", "equal", "vitdet", "stage2-L", "stage2-g", "stage2-E", "compile", "kernels"}


def check(root, output, *arguments) -> tuple[int, dict, str]:
    command = [
        root / "scripts" / "gpu_check.sh",
        "--device",
        "cpu",
        "--small",
        "--output",
        output,
        *arguments,
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert (output / "gpu_check.json").is_file(), done.stderr
    found = json.loads((output / "gpu_check.json").read_text())
    assert done.stdout.strip() == (output / "gpu_check.md").read_text().strip()
    assert "dry run on a CPU. Its figures mean nothing for a GPU" in done.stdout and found["dry_run"]
    return done.returncode, found, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_dry_run_fills_the_table(root, tmp_path):
    status, found, table = check(root, tmp_path / "out")
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(PARTS, "ok")
    assert status == 0
    for name, part in found["parts"].items():
        assert len(part["rows"]) >= 4, name
        for row in part["rows"]:
            assert math.isfinite(row["figure"]) and row["figure"] >= 0 and row["what"] in table, row
    stage2 = [row["what"] for row in found["parts"]["stage2-E"]["rows"]]
    assert all(any(kind in what for what in stage2) for kind in ("plain", "checkpointing", "compiled"))
    equal = [row["figure"] for row in found["parts"]["equal"]["rows"] if "float32" in row["what"]]
    assert equal == [0, 0]


def test_a_part_that_fails_says_so_and_the_next_begins(root, tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text("raise ImportError('no tests here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    status, found, table = check(root, tmp_path / "out", "--parts", "tests", "compile")
    assert status == 1
    assert (
        "no tests here" in found["parts"]["tests"]["status"] and found["parts"]["compile"]["status"] == "ok"
    )
    assert "| tests | failed with status 1" in table
