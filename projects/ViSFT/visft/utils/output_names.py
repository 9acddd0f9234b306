"""Names of a tool's output files for input images: no output replaces an input or another output."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name without suffix for each image: its stem, or its folders and file name if the stem is not unique."""
    paths = [path.resolve() for path in paths]
    # Some file systems ignore case.
    stems = Counter(path.stem.lower() for path in paths)
    found: list[str] = []
    for path in paths:
        folders = path.parent.parts[1:]
        longer = ["_".join([*folders[-depth:], path.name]) for depth in range(1, len(folders) + 1)]
        options = longer if stems[path.stem.lower()] > 1 else [path.stem, *longer]
        taken = {name.lower() for name in found}
        free = (option for option in options if option.lower() not in taken)
        found.append(next(free, f"{path.stem}_{len(found)}"))
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
