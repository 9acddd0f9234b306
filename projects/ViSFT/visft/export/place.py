"""Where exports go: names are checked first, files come from a folder aside, and nothing of the user's is removed."""

import importlib.util
import json
import os
from pathlib import Path

from visft.checkpoint.files import put_in_place, read_json, sync_folder
from visft.errors import CheckpointError, ExportError


def file(path: str | os.PathLike, *suffixes: str) -> Path:
    """The path of a file to be written.

    Raises:
        ExportError: another ending, or a folder is there.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ExportError(f"{path}: the name must end in {' or '.join(suffixes)}, as its readers expect.")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; give the name of a file.")
    return path


def folder(path: str | os.PathLike) -> Path:
    """The path of a folder to be written.

    Raises:
        ExportError: a file is there.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path}: is a file; the format writes a folder: give another name.")
    return path


def refuse_other(path: Path, key: str | None, config: dict) -> None:
    """Raise ExportError where a description of another model lies: it speaks for all weights beside it.

    Args:
        key: the part of the file that tells models apart; None: all of it.
    """
    if not path.exists():
        return
    try:
        there = read_json(path)
        there = there.get(key) if key else there
    except (CheckpointError, AttributeError):
        there = None
    if there != json.loads(json.dumps(config)):
        raise ExportError(f"{path}: belongs to another architecture; write the export to another folder.")


def put_all(source: Path, target: Path) -> None:
    """Give the files of a folder aside their names in `target`, the weights first; other files there stay."""
    if not target.exists():
        os.replace(source, target)
        sync_folder(target.parent)
        return
    for one in sorted(source.iterdir(), key=lambda file: file.suffix != ".safetensors"):
        put_in_place(one, target / one.name)


def require(format_name: str, *packages: str) -> None:
    """Raise ExportError unless the packages that write or check a format are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"The format `{format_name}` needs {' and '.join(missing)}, which this environment lacks; install the "
            "extra `export`: pip install -e '.[export]'."
        )
