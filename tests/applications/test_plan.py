"""What `tools/train_net.py --plan` says is what a built model has and what its steps do."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visft.applications import plan, simulated_step
from visft.commands import train_net
from visft.engine import checks, settings

SMALL = {
    "MODEL.CLIP_VIT.PRETRAINED": "",
    "MODEL.VISFT.HEAD_FILES": "()",
    "MODEL.VISFT.HEADS": "('detection',)",
    "MODEL.VISFT.OBJECTIVES": "()",
    "VISFT.INPUT.SIZE": 128,
    "MODEL.VISFT.DETECTION.DECODER_LAYERS": 1,
    "MODEL.VISFT.DETECTION.ENCODER_LAYERS": 1,
    "MODEL.VISFT.SEGMENTATION.DECODER_LAYERS": 1,
    "VISFT.SOLVER.HEADS.IMS_PER_BATCH": 2,
    "VISFT.SOLVER.LORA.IMS_PER_BATCH": 2,
}

BOTH = {"MODEL__VISFT__HEADS": "('detection', 'segmentation')", "VISFT__INPUT__SIZE": 64}

MEMORY = 0.1
"""GiB; a few images fit."""

RCNN = [
    "MODEL.VISFT.HEADS",
    "('detection',)",
    "MODEL.VISFT.DETECTION.HEAD",
    "RCNNHead",
    "MODEL.VISFT.HEAD_FILES",
    "()",
]
RCNN += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
RCNN += ["MODEL.ROI_BOX_HEAD.NUM_FC", "1", "MODEL.MASK_ON", "False"]


def config(root, **keys):
    words = [
        str(w) for pair in (SMALL | {k.replace("__", "."): v for k, v in keys.items()}).items() for w in pair
    ]
    cfg = settings.load_config(str(root / "configs" / "visft_demo.yaml"), words)
    checks.check(cfg, here=False)
    cfg.freeze()
    return cfg


def rows(cfg) -> dict[str, dict]:
    return {row["stage"]: row for row in plan.plan(cfg)["steps"]}


@pytest.fixture(scope="module")
def planned(root):
    return plan.plan(config(root), memories=(MEMORY,))


@pytest.fixture(scope="module")
def with_masks(root):
    """Masks are most of the work of a plan."""
    cfg = config(root, **BOTH)
    return cfg, plan.plan(cfg)


def test_parameters_and_weights_are_those_of_the_model(with_masks):
    cfg, found = with_masks
    model, counts = build_model(cfg), found["parameters"]
    total = sum(p.numel() for p in model.parameters())
    assert sum(counts[name]["all"] for name in ("tower", "LoRA", "detection", "segmentation")) == total
    for row in found["steps"]:
        model.set_stage(row["stage"])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(part[row["stage"]] for part in counts.values()) == trained == row["trained"] / 4
        assert row["optimizer"] == 2 * row["gradients"] == 2 * row["trained"]


@pytest.mark.parametrize("stage", ["heads", "lora"])
def test_step_is_that_of_a_real_model(with_masks, stage):
    """Its activations by the hooks of autograd, its operations with attention as plain products."""
    cfg, found = with_masks
    row = next(row for row in found["steps"] if row["stage"] == stage)
    model = build_model(cfg)
    model.set_stage(stage)
    images = simulated_step.batch(2, (64, 64), objects=plan.OBJECTS, words=plan.CAPTION_WORDS, fake=False)
    kept, weights = {}, {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(images)
    assert row["tower"] + row["heads"] == pytest.approx(sum(kept.values()), rel=0.1)
    del losses
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(images).values()).backward()
    assert row["step_flop"] == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_grows_with_batch_and_size_and_falls_with_what_saves_memory(root, planned):
    usual = {row["stage"]: row for row in planned["steps"]}
    assert usual["heads"]["tower"] < usual["lora"]["tower_with_checkpointing"]
    assert 3 * usual["lora"]["tower_with_checkpointing"] < usual["lora"]["tower_without_checkpointing"]
    more = rows(config(root, VISFT__SOLVER__LORA__IMS_PER_BATCH=4, VISFT__SOLVER__HEADS__IMS_PER_BATCH=4))
    larger = rows(config(root, VISFT__INPUT__SIZE=256))
    fewer = rows(config(root, MODEL__LORA__LAST_BLOCKS=2))
    for stage, row in usual.items():
        assert row["peak"] < more[stage]["peak"] and row["peak"] < larger[stage]["peak"]
        assert more[stage]["forward_flop"] == pytest.approx(2 * row["forward_flop"], rel=0.02)
    # Half of the blocks with LoRA of the config keep half of the activations, beside the map and the images.
    kept = [r["lora"]["tower"] - r["heads"]["tower"] for r in (fewer, usual)]
    assert kept[0] == pytest.approx(kept[1] / 2, rel=0.02)


def test_few_blocks_stand_for_all(root, monkeypatch):
    cfg = config(root, MODEL__LORA__LAST_BLOCKS=5)
    short = plan.plan(cfg)["steps"]
    monkeypatch.setattr(simulated_step, "_FEW", 100)
    assert plan.plan(cfg)["steps"] == short


def test_a_memory_budget_is_in_the_plan(root, planned):
    [usual] = [row for row in planned["steps"] if row["stage"] == "lora"]
    kept, recomputed = usual["tower_without_checkpointing"], usual["tower_with_checkpointing"]
    keys = {"MODEL__CLIP_VIT__ACTIVATION_CHECKPOINTING": True, "VISFT__STAGES": "('lora',)"}
    budget = (kept - recomputed) / 2
    found = rows(config(root, **keys, MODEL__CLIP_VIT__MEMORY_BUDGET_GIB=budget / 2**30))["lora"]
    assert recomputed < found["tower"] < recomputed + 1.01 * budget < kept


def test_what_is_said_to_fit_fits(root, planned):
    for row in planned["steps"]:
        [fit] = row["fits"]
        stage = row["stage"].upper()
        for more, expected in ((0, True), (1 + fit["images"] // 5, False)):
            key = {
                f"VISFT__SOLVER__{stage}__IMS_PER_BATCH": fit["images"] + more,
                "VISFT__STAGES": f"('{row['stage']}',)",
            }
            assert (rows(config(root, **key))[row["stage"]]["peak"] <= MEMORY * 2**30) == expected


def test_command(root, tmp_path, capsys):
    words = [str(word) for pair in SMALL.items() for word in pair] + ["OUTPUT_DIR", str(tmp_path / "run")]
    options = [
        "--config-file",
        str(root / "configs" / "visft_demo.yaml"),
        "--plan",
        "--output",
        str(tmp_path / "p"),
    ]
    assert train_net.main([*options, *words]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "p").read_text())
    for row in found["steps"]:
        assert f"{row['peak'] / 2**30:.2f}" in shown and f"{row['step_flop'] / 1e12:.3g}" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plan", "MODEL.LORA.RANK", "0"], "MODEL.LORA.RANK"),
        (["--plan", "--gpu-memory", "-1"], "--gpu-memory is -1"),
        (["--gpu-memory", "8"], "--plan"),
        (["--plan", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "MODEL.META_ARCHITECTURE"),
        (["--plan", *RCNN], "RCNNHead"),
    ],
)
def test_what_is_refused(root, capsys, options, words):
    file = str(root / "configs" / "visft_demo.yaml")
    assert train_net.main(["--config-file", file, *options]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_largest_tower_takes_little_memory(root):
    command = [sys.executable, "tools/train_net.py", "--config-file", "configs/visft_eva.yaml", "--plan"]
    shown = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert "4350.56" in shown  # open_clip's count of EVA02-E-14-plus's vision tower
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3e9


def test_pieces_of_the_tower_leave_the_rest_whole(root):
    """With as many processes as make a piece small, what is left is two blocks and the rest of the model."""
    whole, pieces = (
        plan.plan(
            config(root, VISFT__STRATEGY=s, VISFT__STAGES="('lora',)", MODEL__VISFT__FREEZE_HEADS=True),
            processes=2,
        )
        for s in ("DDP", "FSDP2")
    )
    one, other = whole["steps"][0], pieces["steps"][0]
    model = build_model(config(root))
    model.set_stage("lora")
    parts = [[p.numel() * 4 for p in block.parameters()] for block in model.backbone.blocks]
    trains = [
        [p.numel() * 4 for p in block.parameters() if p.requires_grad] for block in model.backbone.blocks
    ]
    inside, trained = sum(map(sum, parts)), sum(map(sum, trains))
    assert one["trained"] == trained and other["trained"] == trained / 2
    frozen = sum(one["frozen"].values()) - sum(other["frozen"].values())
    assert frozen == (inside - trained) / 2
    assert one["peak"] - other["peak"] == frozen + 4 * trained / 2 - 2 * max(map(sum, parts))


@pytest.mark.parametrize(
    "lines", [[(10, 3)], [(50, 1), (0, 4)], [(60, 0.5), (0, 3), (-100, 6)], [(90, 0.1), (-500, 40)]]
)
@pytest.mark.parametrize("limit", [13, 55, 100, 400])
def test_the_largest_that_fits_does_whatever_lines_the_peak_is_of(lines, limit):
    def peak(x: int) -> float:
        return max(start + slope * x for start, slope in lines)

    found = int(plan.largest(peak, limit, (1, 8, 16), peak(8)))
    assert not found or peak(found) <= limit
    if len(lines) == 1:
        assert found == (limit - 10) // 3
