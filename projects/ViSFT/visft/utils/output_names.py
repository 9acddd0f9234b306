"""Names of a tool's output files for input images: no output replaces an input or another output."""

from collections.abc import Sequence
from pathlib import Path


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name without suffix for each image: its stem, or its folders and file name if the stem is not unique."""
    paths = [path.resolve() for path in paths]
    found: list[str] = []
    for path in paths:
        options = [path.stem]
        options += ["_".join([*path.parent.parts[-depth:], path.name]) for depth in range(len(path.parts))]
        options = [option.replace("/", "") for option in options]
        alike = [other.stem.lower() for other in paths].count(path.stem.lower()) > 1
        # Some file systems ignore case.
        taken = {name.lower() for name in found}
        free = [option for option in options[2 if alike else 0 :] if option.lower() not in taken]
        found.append(free[0] if free else f"{path.stem}_{len(found)}")
    return found


def names_beside(paths: Sequence[Path], folder: Path, endings: Sequence[str]) -> list[str]:
    """As `output_names`. A name whose files in `folder` would replace an image or another output ends in `_predicted`.

    Args:
        endings: of a name's files, as `.png`.
    """
    taken = {str(path.resolve()).lower() for path in paths}
    found: list[str] = []
    for name in output_names(paths):
        while taken & (written := {str((folder / (name + ending)).resolve()).lower() for ending in endings}):
            name = f"{name}_predicted"
        taken |= written
        found.append(name)
    return found
