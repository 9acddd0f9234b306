"""The exports of a run, from its model or from its files."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from visft import export as formats
from visft.checkpoint import files, load
from visft.checkpoint.run_folder import run_files
from visft.engine.trainer import seed_iteration
from visft.export import streamed
from visft.modeling.backbone import CLIPViT, lora, open_clip_models
from visft.modeling.backbone.sharding import is_sharded

logger = logging.getLogger(__name__)


def export(cfg: CfgNode, backbone: CLIPViT, folder: Path, *, seed: int | None = None) -> list[Path]:
    """Write the tuned tower in every format of `VISFT.EXPORT`. Each export is reopened and compared before it appears.

    A tower in pieces (`VISFT.STRATEGY FSDP2`) is not gathered: the export is made from the run's files.

    Args:
        folder: OUTPUT_DIR/export. Gets `visft_backbone.safetensors` with its configuration (open_clip), and a folder
            for each other format (`timm/model.safetensors`, `hf`, ...).
        seed: of the run, from which a random base is drawn again.

    Returns:
        The written files and folders.

    Raises:
        ExportError: a format does not fit the tower, or its reader disagrees.
    """
    written = []
    about = facts(cfg, folder.parent)
    for name in cfg.VISFT.EXPORT:
        kind = formats.FORMATS[name]
        path = folder / kind.file_name
        if is_sharded(backbone):
            written += export_files(cfg, folder.parent, name, [(1.0, path)], about, seed=seed)
        else:
            written.append(kind.write(backbone, path, facts=about))
        logger.info("exported %s", written[-1])
    return written


def export_files(
    cfg: CfgNode,
    weights: str | os.PathLike,
    format_name: str,
    outputs: Sequence[tuple[float, Path]],
    about: formats.Facts,
    *,
    seed: int | None = None,
    verify: bool = False,
) -> list[Path]:
    """Write the tower of a run's or LoRA's files, streamed from the base's file where possible, else built.

    Args:
        weights: a run's OUTPUT_DIR or a weight file.
        outputs: a factor on the update of the base's weights, and a file or folder, for each export.
        seed: of a run, from which a random base is drawn again.
        verify: as for `streamed.run`.

    Raises:
        CheckpointError: base and weights do not fit.
        ExportError: the format does not fit the tower, or its reader disagrees.
    """
    paths = run_files(weights)
    shapes = {name: shape for path in paths for name, shape in files.read_shapes(path).items()}
    base = streamed.base_file(cfg, format_name, shapes)
    if base is not None:
        return streamed.run(cfg, paths, base, format_name, outputs, about, verify=verify)
    vit = cfg.MODEL.CLIP_VIT
    formats.check(format_name, open_clip_models.meta_tower(vit.NAME))
    if seed is not None:
        seed_iteration(seed, "build", 0)
    backbone = CLIPViT.from_open_clip(vit.NAME, vit.PRETRAINED or None)
    if any(".lora_" in name or name.startswith("lora_") for name in shapes):
        lora.inject(backbone, **lora.options(cfg))
    load.load_tower(backbone, weights)
    backbone.eval()
    writer = formats.FORMATS[format_name].write
    return [writer(backbone, path, interpolate=amount, facts=about) for amount, path in outputs]


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
