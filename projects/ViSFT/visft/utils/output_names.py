"""Names of the files that a tool writes for images of the user's own: none replaces an input or another output."""

from collections.abc import Sequence
from pathlib import Path


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image, without suffix: its stem; where others have that too, its file name after its folders."""
    paths = [path.resolve() for path in paths]
    found: list[str] = []
    for path in paths:
        options = [path.stem]
        options += ["_".join([*path.parent.parts[-depth:], path.name]) for depth in range(len(path.parts))]
        options = [option.replace("/", "") for option in options]
        alike = [other.stem.lower() for other in paths].count(path.stem.lower()) > 1
        # Files whose names differ in case alone are one file on some systems.
        taken = {name.lower() for name in found}
        free = [option for option in options[2 if alike else 0 :] if option.lower() not in taken]
        found.append(free[0] if free else f"{path.stem}_{len(found)}")
    return found


def names_beside(paths: Sequence[Path], folder: Path, endings: Sequence[str]) -> list[str]:
    """As `output_names`; a name whose files in `folder` would replace an image or other files ends in `_predicted`.

    Args:
        endings: what a name's files end in, as `.png`.
    """
    taken = {str(path.resolve()).lower() for path in paths}
    found: list[str] = []
    for name in output_names(paths):
        while taken & (written := {str((folder / (name + ending)).resolve()).lower() for ending in endings}):
            name = f"{name}_predicted"
        taken |= written
        found.append(name)
    return found
