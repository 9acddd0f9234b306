"""Every shipped ViSFT config: known keys and names, the recipe's figures, CLIP's normalisation."""

from pathlib import Path

import pytest

from visft.engine import checks, settings

ROOT = Path(__file__).resolve().parent.parent

CONFIGS = sorted((ROOT / "configs").glob("visft_*.yaml"))
NO_WEIGHTS = ["MODEL.DEVICE", "cpu", "MODEL.CLIP_VIT.PRETRAINED", "", "MODEL.VISFT.HEAD_FILES", "()"]


def load(name: str, *opts: str):
    return settings.load_config(str(ROOT / "configs" / f"{name}.yaml"), list(opts))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_names_are_known(file):
    cfg = settings.load_config(str(file), NO_WEIGHTS)
    for stage in ("HEADS", "LORA"):
        cfg.VISFT.SOLVER[stage].AMP = ""
    checks._device(cfg, 1)
    checks._names(cfg)
    checks._visft_names(cfg, processes=1)


@pytest.mark.parametrize("name", ["visft_vit_b16", "visft_vit_l14", "visft_demo"])
def test_normalisation_is_clips(name):
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    cfg = load(name)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.MASK_ON
    assert pytest.approx([255 * v for v in OPENAI_DATASET_MEAN], abs=1e-5) == list(cfg.MODEL.PIXEL_MEAN)
    assert pytest.approx([255 * v for v in OPENAI_DATASET_STD], abs=1e-5) == list(cfg.MODEL.PIXEL_STD)


@pytest.mark.parametrize(("name", "tower"), [("visft_eva", "EVA02-E-14-plus"), ("visft_eva_g", "EVA01-g-14")])
def test_the_authors_recipe(name, tower):
    cfg = load(name)
    assert (tower, "drop") == (cfg.MODEL.CLIP_VIT.NAME, cfg.MODEL.CLIP_VIT.CLASS_TOKEN)
    lora = cfg.MODEL.LORA
    assert (lora.RANK, lora.ALPHA, lora.DROPOUT, tuple(lora.TARGETS)) == (64, 1.0, 0.0, ("q", "v"))
    assert lora.LAST_BLOCKS == 0 and tuple(cfg.MODEL.VISFT.OBJECTIVES) == ()  # those are ours, not theirs
    heads, second = cfg.VISFT.SOLVER.HEADS, cfg.VISFT.SOLVER.LORA
    assert (heads.BASE_LR, heads.MAX_ITER, heads.IMS_PER_BATCH) == (5e-5, 150000, 8)
    assert (second.BASE_LR, second.MAX_ITER) == (1e-5, 100000)
    for solver in (heads, second):
        assert (solver.WEIGHT_DECAY, solver.WARMUP_ITERS, solver.CLIP_NORM) == (1e-4, 2000, 0.1)
    detection = cfg.MODEL.VISFT.DETECTION
    assert (detection.LABEL_SPACE, detection.NUM_CLASSES) == ("dataset_id", 91)
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == tuple(range(480, 673, 32)) and cfg.INPUT.MAX_SIZE_TRAIN == 672
    assert list(cfg.MODEL.PIXEL_MEAN) == [123.675, 116.28, 103.53]
    mixing = cfg.VISFT
    assert mixing.TASK_MIXING == "ratio"
    ratios = dict(zip(cfg.MODEL.VISFT.HEADS, mixing.TASK_RATIOS, strict=True))
    assert ratios == {"captioning": 0.4, "segmentation": 0.3, "detection": 0.3}
    assert (mixing.INPUT.AUGMENTATION, second.IMS_PER_BATCH) == ("detection", 8)
    tasks = {head: mixing.TASKS[head.upper()] for head in cfg.MODEL.VISFT.HEADS}
    captioning = tasks["captioning"]
    assert (captioning.AUGMENTATION, captioning.SIZE, captioning.IMS_PER_BATCH) == ("square", 256, 64)
    assert (tasks["segmentation"].AUGMENTATION, tasks["segmentation"].SIZE) == ("lsj", 1024)
