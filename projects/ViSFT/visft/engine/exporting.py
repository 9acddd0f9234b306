"""The exports at the end of a run."""

import logging
from pathlib import Path

from detectron2.config import CfgNode

from visft.backbone import CLIPViT
from visft.checkpoint import export as formats

logger = logging.getLogger(__name__)


def export(cfg: CfgNode, backbone: CLIPViT, folder: Path) -> list[Path]:
    """Write the tuned tower in every format of `VISFT.EXPORT`; each is reopened and compared before it is there.

    Args:
        folder: gets `visft_backbone.safetensors` with its configuration (open_clip), `visft_lora.safetensors`, ...

    Returns:
        The files.

    Raises:
        ExportError: a format does not fit the tower, or its reader disagrees.
    """
    written = []
    for name in cfg.VISFT.EXPORT:
        kind = formats.FORMATS[name]
        folder.mkdir(parents=True, exist_ok=True)
        written.append(kind.write(backbone, folder / kind.file_name))
        logger.info("exported %s", written[-1])
    return written
