"""Paths of exports: names are checked first, files come from a temporary folder, and no file of the user is removed."""

import importlib.util
import json
import logging
import os
from pathlib import Path

from visft.checkpoint.files import put_in_place, read_json, sync_folder
from visft.errors import CheckpointError, ExportError
from visft.export import card

logger = logging.getLogger(__name__)

_ORDER = {".data": 0, ".onnx": 1, ".pt": 1, ".safetensors": 1, ".md": 3}
"""The order in which files get their names, by suffix: first those that others need."""


def file(path: str | os.PathLike, *suffixes: str) -> Path:
    """Return the path of a file to be written.

    Raises:
        ExportError: the suffix is wrong, or the path is a folder.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ExportError(f"{path}: the name must end in {' or '.join(suffixes)}, as its readers expect.")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; give the name of a file.")
    return path


def folder(path: str | os.PathLike) -> Path:
    """Return the path of a folder to be written.

    Raises:
        ExportError: the path is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path}: is a file; the format writes a folder: give another name.")
    return path


def refuse_other(path: Path, content: dict, key: str) -> None:
    """Raise ExportError if the description of another model is there. It applies to all weights beside it.

    Args:
        content: the new content of the file.
        key: the part of it that tells models apart; "": all of it.
    """
    if not path.exists():
        return
    try:
        there = read_json(path)
        there = there.get(key) if key else there
    except (CheckpointError, AttributeError):
        there = None
    if there != json.loads(json.dumps(content[key] if key else content)):
        raise ExportError(f"{path}: belongs to another architecture; write the export to another folder.")


def put_all(source: Path, target: Path) -> None:
    """Move the files of a temporary folder to `target`, weights first and card last.

    Other files in `target` stay. A file with the card's name stays, too, unless it is one of our cards.
    """
    if not target.exists():
        os.replace(source, target)
        sync_folder(target.parent)
        return
    for file in sorted(source.iterdir(), key=lambda file: (_ORDER.get(file.suffix, 2), file.name)):
        there = target / file.name
        if file.suffix == ".md" and there.exists() and card.MARK not in _text(there):
            logger.info("%s is no model card of ours and stays as it is", there)
        else:
            put_in_place(file, there)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def require(format_name: str, *packages: str) -> None:
    """Raise ExportError unless the packages that write or check a format are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"The format `{format_name}` needs {' and '.join(missing)}, which this environment lacks; install the "
            "extra `export`: pip install -e '.[export]'."
        )
