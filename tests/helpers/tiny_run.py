"""Arguments of a run of seconds: shapes of three classes, the demo tower with random weights, small heads."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "visft_demo.yaml")


def tiny_arguments(train: tuple[Path, Path], test: tuple[Path, Path] | None, output: Path) -> list[str]:
    """Over configs/visft_demo.yaml, into `output`; `test` None: without evaluation."""
    keys = {
        "OUTPUT_DIR": output,
        "VISFT.DATA.TRAIN_JSON": train[0],
        "VISFT.DATA.TRAIN_IMAGES": train[1],
        "VISFT.EXPORT": "()",
        "VISFT.INPUT.SIZE": 64,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 64,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MAX_SIZE_TRAIN": 64,
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.CLIP_VIT.PRETRAINED": "",
        "MODEL.LORA.RANK": 2,
        "MODEL.LORA.ALPHA": 16.0,
        "MODEL.LORA.DROPOUT": 0.1,
        "MODEL.LORA.TARGETS": "('q', 'v')",
        "MODEL.LORA.LAST_BLOCKS": 0,
        "MODEL.VISFT.OBJECTIVES": "()",
        "MODEL.VISFT.ANCHOR.WEIGHT": 10.0,
        "MODEL.VISFT.ANCHOR.CROPS": 0,
        "MODEL.VISFT.ANCHOR.RECOLOR": False,
        "MODEL.VISFT.HEADS": "('detection', 'segmentation')",
        "MODEL.VISFT.HEAD_FILES": "()",
        "MODEL.VISFT.DETECTION.DROPOUT": 0.1,
    }
    for head in ("DETECTION", "SEGMENTATION"):
        keys |= {
            f"MODEL.VISFT.{head}.{key}": value
            for key, value in {"NUM_QUERIES": 5, "ENCODER_LAYERS": 1, "DECODER_LAYERS": 1}.items()
        }
    keys["MODEL.VISFT.SEGMENTATION.NUM_POINTS"] = 64
    if test is not None:
        keys |= {"VISFT.DATA.TEST_JSON": test[0], "VISFT.DATA.TEST_IMAGES": test[1]}
    for stage in ("HEADS", "LORA"):
        solver = {
            "IMS_PER_BATCH": 2,
            "MAX_ITER": 4,
            "WARMUP_ITERS": 2,
            "CHECKPOINT_PERIOD": 2,
            "BASE_LR": 0.001,
        }
        keys |= {f"VISFT.SOLVER.{stage}.{key}": value for key, value in solver.items()}
    return ["--config-file", DEMO, *(str(word) for pair in keys.items() for word in pair)]
