"""The exports at the end of a run."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

logger = logging.getLogger(__name__)


def export(cfg: CfgNode, model: nn.Module, folder: Path) -> None:
    """Write what `VISFT.EXPORT` names to a folder."""
    for name in cfg.VISFT.EXPORT:
        raise NotImplementedError(name)
