"""CLIPs to compare: checks and labels before they are loaded, and loading for `towerbench`."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from visft.checkpoint import files
from visft.errors import CheckpointError, ConfigError
from visft.modeling.backbone import CLIPViT, open_clip_models

if TYPE_CHECKING:
    from towerbench import Tower


def load(name: str, pretrained: str | None, *, label: str = "base", device: str | None = None) -> "Tower":
    """A tower for the benchmarks. Its maps are CLIPViT's; a tower that is no plain vision transformer has none.

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
        CheckpointError: a file is missing or no weight file, or holds no whole CLIP.
    """
    with said_of("--model"):
        open_clip_models.check_name(name)
    for option, given in (("--pretrained", pretrained), *(("--compare", file) for file in compare)):
        with said_of(option, given):
            open_clip_models.check_pretrained(name, given)
            if not os.path.isfile(given):
                continue
            parts = {key.startswith("visual.") for key in files.read_shapes(given)}
            if parts != {True, False}:
                found = "a vision tower without a text encoder" if parts == {True} else "no whole CLIP"
                raise CheckpointError(
                    f"{given}: holds {found}; a CLIP with both was expected, as "
                    "tools/export_backbone.py --format open_clip writes it"
                )


@contextlib.contextmanager
def said_of(option: str, given: str = "") -> Iterator[None]:
    """Within it, errors name an option and its value instead of a key of MODEL.CLIP_VIT."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        place = rf"^(MODEL\.CLIP_VIT\.\w+(:| is) )?('?{re.escape(given)}'?[:,]? )?"
        message = re.sub(place, "", str(error))
        raise type(error)(f"{option} {given}: {message}" if given else f"{option}: {message}") from error


def labels(compare: Sequence[str]) -> list[str]:
    """Short names of files: the stem, preceded by as many folders as make it unique.

    Raises:
        ConfigError: a file is given twice.
    """
    from towerbench import errors, towers

    try:
        return towers.labels(compare)
    except errors.ConfigError as error:
        raise ConfigError(str(error)) from error
