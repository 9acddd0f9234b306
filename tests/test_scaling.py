"""scripts/scaling.py against numbers computed by hand, and against what real processes exchange."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import exchanged_bytes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    module = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(tower: int, lora: int, head: int = 0, stored: str = "float16", flop: float = 1e12) -> dict:
    step = {
        "stage": "lora",
        "task": None,
        "images": 2,
        "size": [8, 8],
        "step_flop": flop,
        "frozen": {"float32": 8, stored: 9},
    }
    parameters = {
        "tower": {"all": tower, "heads": 0, "lora": 0},
        "LoRA": {"all": lora, "heads": 0, "lora": lora},
        "detection": {"all": 70, "heads": 70, "lora": head},
    }
    return {"tower": "T", "parameters": parameters, "steps": [step | {"stage": "heads"}, step]}


# parameters of the tower, of LoRA, trained ones of a head, type, GPUs; bytes of DDP, bytes of FSDP2 that computation
# hides and that it does not.
BYTES = [
    # 2 * 3/4 * 400; 3/4 * (2 * (2000 + 400) + 400)
    (1000, 100, 0, "float16", 4, 600.0, 3900.0, 0.0),
    # 2 * 1/2 * (400 + 80); 1/2 * (2 * (4000 + 400) + 400); 2 * 1/2 * 80
    (1000, 100, 20, "float32", 2, 480.0, 4600.0, 80.0),
    (1000, 100, 20, "float16", 1, 0.0, 0.0, 0.0),
    # EVA02-E with rank 64 on q and v: 64 blocks * 2 projections * 64 * (1792 + 1792) = 29,360,128 parameters
    (4_350_556_928, 64 * 2 * 64 * 3584, 0, "bfloat16", 8, 205_520_896.0, 15_535_230_592.0, 0.0),
    (4_350_556_928, 64 * 2 * 64 * 3584, 0, "bfloat16", 64, 231_211_008.0, 17_477_134_416.0, 0.0),
]


@pytest.mark.parametrize("tower, lora, head, stored, gpus, ddp, hidden, added", BYTES)
def test_bytes(scaling, tower, lora, head, stored, gpus, ddp, hidden, added):
    found = scaling.exchanges(plan(tower, lora, head, stored), gpus)
    assert found == {"DDP": scaling.Exchange(0.0, ddp), "FSDP2": scaling.Exchange(hidden, added)}


def test_bytes_of_real_processes(scaling, tmp_path):
    """Beside gradients and weights, they exchange a few counts. FSDP2 gathers one block ahead for nothing."""
    found = exchanged_bytes.counted(tmp_path)
    expected = scaling.exchanges(
        plan(found["blocks"], found["LoRA"], stored="float32"), exchanged_bytes.WORLD
    )
    assert found["DDP"] == pytest.approx(expected["DDP"].added, rel=0.01)
    block = 4 * (found["blocks"] + found["LoRA"]) / 8 / exchanged_bytes.WORLD
    assert found["FSDP2"] == pytest.approx(expected["FSDP2"].hidden + block, rel=1e-4)


def test_times_and_where_they_begin_to_matter(scaling):
    """A step computes for 1 s. 600 bytes are added; 3,900 bytes are hidden unless they take longer."""
    found = scaling.rows(plan(1000, 100), [4], [600.0, 1950.0, 7800.0], flops=1e12)
    ddp, fsdp = found
    assert ddp["compute"] == 1.0 and ddp["times"] == pytest.approx([2.0, 1 + 600 / 1950, 1 + 600 / 7800])
    assert fsdp["times"] == pytest.approx([6.5, 2.0, 1.0])
    assert ddp["matters_below"] == pytest.approx(12000)  # 600 bytes in 0.05 s
    assert fsdp["matters_below"] == pytest.approx(3900 / 1.05)
    for exchange in (
        scaling.Exchange(0.0, 600.0),
        scaling.Exchange(3900.0, 0.0),
        scaling.Exchange(500.0, 80.0),
    ):
        assert exchange.seconds(2.0, exchange.matters_below(2.0)) == pytest.approx(2.1)
    assert scaling.rows(plan(1000, 100), [4], [600.0], seconds=3.0)[0]["times"] == pytest.approx([4 / 3])


def test_the_command(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan(1_000_000, 100_000)))
    words = [sys.executable, str(SCRIPT), str(file), "--seconds", "0.5", "--gpus", "8", "--bandwidths", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "not a measurement" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "|  | 2 x 8 x 8 | 0.5 | 8 | DDP | 0.0007 | 0.028 | 1.00 |",
        "|  | 2 x 8 x 8 | 0.5 | 8 | FSDP2 | 0.00455 | 0.00867 | 1.00 |",
    ]
    file.write_text(json.dumps(plan(10, 1) | {"steps": []}))
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "has no stage lora" in done.stderr
