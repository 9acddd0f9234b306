"""What the tools answer before torch and detectron2 are imported, and that they are the tools they were."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from visft import export
from visft.commands import benchmark, export_backbone, predict, train_net
from visft.engine import checks
from visft.visualization import predictions

ROOT = Path(__file__).resolve().parents[2]
MOVED = sorted(p.stem for p in (ROOT / "tools").glob("[a-z]*.py") if "from _start" in p.read_text())
HEAVY = {
    "torch",
    "torchvision",
    "detectron2",
    "open_clip",
    "timm",
    "pycocotools",
    "matplotlib",
    "cv2",
    "scipy",
}
QUESTIONS = [*(f"{name}.py --help" for name in MOVED), "model_zoo.py list", "model_zoo.py table"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_in_less_than_a_second(question):
    tool, *arguments = question.split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools" / tool), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported  # else the next line would say nothing
    assert not imported & HEAVY
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--config-file f.yaml --resume --num-gpus 2 MODEL.DEVICE cpu SEED -1",
        "--eval-only --num-machines 2 --machine-rank 1 --dist-url tcp://a:1 --config-file f.yaml OUTPUT_DIR x",
    ],
)
def test_train_net_reads_detectron2s_arguments(words):
    assert train_net.parse(words.split()) == default_argument_parser().parse_args(words.split())


def test_what_parsers_say_without_importing_is_what_the_package_has(capsys):
    assert export_backbone.FORMATS == tuple(export.FORMATS)
    with pytest.raises(SystemExit):
        benchmark.parse(["--help"])
    assert "{" + ",".join(checks.STAGES) + "}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    assert f"(default: {predictions.THRESHOLD})" in " ".join(capsys.readouterr().out.split())
