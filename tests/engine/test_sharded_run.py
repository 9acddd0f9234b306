"""`VISFT.STRATEGY FSDP2`: a run by processes with pieces of the tower is that of processes with all of it."""

import json
import shutil
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import DEMO, tiny_arguments

from visft.engine.settings import load_config
from visft.engine.tuning_checks import check_strategy
from visft.errors import ConfigError

PLAIN = {
    "MODEL.CLIP_VIT.ACTIVATION_CHECKPOINTING": True,
    "MODEL.VISFT.FREEZE_HEADS": False,  # whole weights train beside pieces
    "MODEL.LORA.DROPOUT": 0.0,
    "MODEL.VISFT.DETECTION.DROPOUT": 0.0,
    "MODEL.VISFT.OBJECTIVES": "('anchor', 'self_distillation')",
    "MODEL.VISFT.ANCHOR.CROPS": 1,
    "MODEL.VISFT.ANCHOR.WEIGHT": 1.0,
    "VISFT.EXPORT": "('open_clip',)",
    "VISFT.SOLVER.HEADS.MAX_ITER": 1,
    "VISFT.SOLVER.LORA.MAX_ITER": 2,
    "VISFT.SOLVER.LORA.CHECKPOINT_PERIOD": 1,
    "VISFT.SOLVER.LORA.WARMUP_ITERS": 1,
    "SEED": 3,
}


@pytest.fixture(scope="module")
def run(shapes_train, shapes_test, tmp_path_factory):
    """Runs `tools/train_net.py` in a folder by so many processes; returns the folder."""

    def start(name: str, *options: str, count: int = 2, **keys: object) -> Path:
        folder = tmp_path_factory.getbasetemp() / name
        words = [str(word) for pair in (PLAIN | keys).items() for word in pair]
        arguments = [*options, *tiny_arguments(shapes_train, shapes_test, folder), *words]
        log = folder.with_suffix(".log")
        group = processes.start_group("train_net.py", arguments, log, count, processes.read_exports_here)
        for process in group:
            process.join(300)
        logs = "\n".join(file.read_text() for file in sorted(folder.parent.glob(f"{log.name}*")))
        assert [process.exitcode for process in group] == [0] * count, logs
        return folder

    return start


@pytest.fixture(scope="module")
def sharded(run) -> Path:
    return run("sharded", **{"VISFT.STRATEGY": "FSDP2"})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{stage}/{kind}/{name}": tensor
        for stage, end in (("heads", 1), ("lora", 2))
        for kind in ("model", "trainer")
        for name, tensor in load_file(folder / stage / f"{kind}_{end:07d}.safetensors").items()
        if tensor.is_floating_point()
    }


def test_a_run_in_pieces_writes_what_a_run_of_whole_towers_does(run, sharded):
    whole = run("whole")
    found, expected = tensors(sharded), tensors(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-6), name
    written = {file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file()}
    assert {file.relative_to(sharded).as_posix() for file in sharded.rglob("*") if file.is_file()} >= {
        name for name in written if "events" not in name
    }
    assert not list(sharded.rglob("*.partial"))
    a, b = (load_file(folder / "export" / "visft_backbone.safetensors") for folder in (sharded, whole))
    assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-6) for n in b)


def cut_short(folder: Path, copy: Path) -> Path:
    """A run's folder as it was after the first iteration of stage lora."""
    shutil.copytree(folder, copy)
    for file in copy.glob("lora/*_0000002.*"):
        file.unlink()
    state = json.loads((copy / "run.json").read_text())
    del state["evaluations"]["lora"]
    (copy / "run.json").write_text(json.dumps(state))
    return copy


@pytest.mark.parametrize(("strategy", "count"), [("FSDP2", 2), ("DDP", 1)])
def test_a_checkpoint_of_pieces_resumes_by_any_number_of_processes(run, sharded, strategy, count):
    cut_short(sharded, sharded.parent / f"{strategy}{count}")
    keys = {"VISFT.STRATEGY": strategy, "VISFT.EXPORT": "()"}
    resumed = run(f"{strategy}{count}", "--resume", count=count, **keys)
    found, expected = tensors(resumed), tensors(sharded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if (strategy, count) == ("FSDP2", 2):
            assert torch.equal(found[name], tensor), name
        else:
            assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("VISFT.FEATURE_CACHE", 1.0),
        ("MODEL.CLIP_VIT.MEMORY_BUDGET_GIB", 1.0),
        ("VISFT.COMPILE", "blocks"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    ],
)
def test_what_pieces_exclude_is_said_before_the_run(key, value):
    cfg = load_config(DEMO, [key, value, "VISFT.STRATEGY", "FSDP2"])
    with pytest.raises(ConfigError, match=f"VISFT.STRATEGY is FSDP2.*{key}"):
        check_strategy(cfg)
    cfg = load_config(DEMO, [key, value])
    check_strategy(cfg)


def test_float16_is_excluded_only_where_whole_weights_train_beside_pieces():
    keys = ["VISFT.STRATEGY", "FSDP2", "VISFT.SOLVER.LORA.AMP", "float16"]
    check_strategy(load_config(DEMO, keys))
    with pytest.raises(ConfigError, match="VISFT.SOLVER.LORA.AMP scales whole gradients"):
        check_strategy(load_config(DEMO, [*keys, "MODEL.VISFT.TUNE", "full"]))
