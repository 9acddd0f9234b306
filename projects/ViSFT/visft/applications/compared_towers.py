"""Whole CLIPs that are compared: checked and labelled before they are loaded, and loaded for `towerbench`."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from visft.checkpoint import files
from visft.errors import CheckpointError, ConfigError
from visft.modeling.backbone import CLIPViT, open_clip_models

if TYPE_CHECKING:
    from towerbench import Tower


def load(name: str, pretrained: str | None, *, label: str = "base", device: str | None = None) -> "Tower":
    """A tower of the benchmarks whose maps are a CLIPViT's; None where it is no plain vision transformer.

    Args:
        name, pretrained: as of `open_clip_models.create_clip`.
        label, device: as of `towerbench.Tower`.

    Raises:
        ConfigError, CheckpointError: as `open_clip_models.create_clip`.
    """
    from towerbench import Tower

    clip, base = open_clip_models.create_clip(name, pretrained)
    try:
        backbone = CLIPViT(clip.visual, base=base)
    except ConfigError:
        backbone = None
    return Tower(clip, backbone, name=name, sha256=base.sha256, label=label, device=device)


def check(name: str, pretrained: str, compare: Sequence[str]) -> None:
    """Check what can be checked of the towers without loading one.

    Raises:
        ConfigError: the architecture or tag is unknown.
        CheckpointError: a file is missing or no weight file, or lacks what the others have.
    """
    open_clip_models.check_name(name)
    for option, given in (("--pretrained", pretrained), *(("--compare", file) for file in compare)):
        try:
            open_clip_models.check_pretrained(name, given)
            if os.path.isfile(given):
                shapes = files.read_shapes(given)
                if not any(key.startswith("visual.") for key in shapes):
                    raise CheckpointError(
                        f"{given}: holds no whole CLIP (no names beginning with `visual.`); a tower and its text tower "
                        "were expected, as tools/export_backbone.py --format open_clip writes them."
                    )
        except (ConfigError, CheckpointError) as error:
            message = (
                str(error)
                .removeprefix("MODEL.CLIP_VIT.PRETRAINED: ")
                .replace("MODEL.CLIP_VIT.PRETRAINED", "it")
            )
            raise type(error)(f"{option} {given}: {message.removeprefix(f'{given}: ')}") from error


def labels(compare: Sequence[str]) -> list[str]:
    """Short names for files: the stem, with as many folders before it as tell them apart.

    Raises:
        ConfigError: a file is given twice.
    """
    from towerbench import errors, towers

    try:
        return towers.labels(compare)
    except errors.ConfigError as error:
        raise ConfigError(str(error)) from error
