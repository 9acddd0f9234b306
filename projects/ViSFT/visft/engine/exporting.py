"""The exports at the end of a run."""

import logging
import os
import shlex
import sys
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from visft import export as formats
from visft.checkpoint import files
from visft.modeling.backbone import CLIPViT

logger = logging.getLogger(__name__)


def export(cfg: CfgNode, backbone: CLIPViT, folder: Path) -> list[Path]:
    """Write the tuned tower in every format of `VISFT.EXPORT`. Each export is reopened and compared before it appears.

    Args:
        folder: OUTPUT_DIR/export. Gets `visft_backbone.safetensors` with its configuration (open_clip), and a folder
            for each other format (`timm/model.safetensors`, `hf`, ...).

    Returns:
        The written files and folders.

    Raises:
        ExportError: a format does not fit the tower, or its reader disagrees.
    """
    written = []
    about = facts(cfg, folder.parent)
    for name in cfg.VISFT.EXPORT:
        kind = formats.FORMATS[name]
        written.append(kind.write(backbone, folder / kind.file_name, facts=about))
        logger.info("exported %s", written[-1])
    return written


def facts(cfg: CfgNode, weights: str | os.PathLike) -> formats.Facts:
    """Return what model cards say about the origin of the weights.

    Args:
        cfg: names the data sets if the run has no `config.yaml`.
        weights: a run's OUTPUT_DIR, whose evaluations become the card's metrics, or a LoRA file, without metrics.
    """
    folder, data, evaluations = Path(weights), (), {}
    if (folder / "run.json").is_file():
        evaluations = files.read_json(folder / "run.json").get("evaluations", {})
        data = cfg.DATASETS.TRAIN
        if (folder / "config.yaml").is_file():
            text = (folder / "config.yaml").read_text(encoding="utf-8")
            data = yaml.safe_load(text)["DATASETS"]["TRAIN"]
    return formats.Facts(
        data=tuple(data),
        command=shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        figures=evaluations,
        run=os.fspath(weights),
    )
