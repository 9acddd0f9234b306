"""The files in a run's folder: which checkpoints of a stage are whole, and what their headers say.

A checkpoint of iteration i is three files in the stage's folder:

    trainer_i.safetensors   optimizer, scheduler, gradient scaler and random generators
    model_i.safetensors     the tensors that trained
    model_i.json            stage, base, and the sizes of both files; with it the checkpoint is whole

Tensors that a run starts from and does not train, such as the heads of HEAD_FILES if only stage `lora` runs, are in
`start/model_0000000.safetensors`, with its JSON.
"""

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visft.checkpoint.files import local_path, read_json, read_metadata, read_shapes, require_file
from visft.errors import CheckpointError

logger = logging.getLogger(__name__)

STAGES = ("heads", "lora")
START = "start"
PARTS = (START, *STAGES)
"""The folders whose newest checkpoints make up a run's model. Each adds to the ones before it."""
_NAME = re.compile(r"model_(\d{7,})\.json")


def describe_base(base: Any) -> dict[str, Any] | None:
    """Describe a base (`BaseTower`) for a header: architecture, tag or file, SHA-256. None: the base is unknown."""
    if base is None:
        return None
    return {"name": base.name, "pretrained": base.pretrained, "sha256": base.sha256}


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Return the header of a checkpoint (stage, iteration, base, settings); `{}` for foreign files."""
    try:
        return json.loads(read_metadata(path).get("visft", "{}"))
    except ValueError:
        return {}


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the model file of the newest whole checkpoint in a stage's folder, or None. Broken ones are logged."""
    for mark in marks(folder):
        fault = _fault(mark)
        if fault is None:
            return mark.with_suffix(".safetensors")
        logger.warning("passed over the checkpoint %s: %s", mark, fault)
    return None


def run_files(path: str | os.PathLike, *, earlier: bool = True) -> list[Path]:
    """Return the model files that make up a run's model, in loading order.

    Args:
        path: a run's OUTPUT_DIR, a stage's folder, or a weight file.
        earlier: whether a stage's files come with those of earlier stages beside its folder, because LoRA alone is not
            a model.

    Raises:
        CheckpointError: a folder without a whole checkpoint.
    """
    path = local_path(path)
    if path.is_dir():
        found = [newest_checkpoint(path / part) for part in PARTS]
        files = [file for file in found if file is not None]
        if files:
            return files
        path = _newest((path,), path, STAGES)
    part = path.absolute().parent
    if not earlier or part.name not in PARTS or describe(path).get("stage") != part.name:
        return [path]
    found = [newest_checkpoint(part.parent / name) for name in PARTS[: PARTS.index(part.name)]]
    return [*(file for file in found if file is not None), path]


def head_file(path: str | os.PathLike) -> Path:
    """Return the file that heads start from: a weight file itself, or the newest one of a run's or a stage's folder.

    Raises:
        CheckpointError: a folder without a whole checkpoint of heads.
    """
    path = local_path(path)
    return _newest((path / "heads", path / START, path), path, ("heads",)) if path.is_dir() else path


def _newest(folders: Iterable[Path], path: Path, stages: Iterable[str]) -> Path:
    """Return the newest checkpoint of the first folder that has one."""
    found = next(filter(None, map(newest_checkpoint, folders)), None)
    if found is None:
        raise CheckpointError(
            f"{path}: no whole checkpoint in this folder (nor in its {' or '.join(f'{s}/' for s in stages)}); "
            "give a run's OUTPUT_DIR or a weight file."
        )
    return found


def marks(folder: str | os.PathLike) -> list[Path]:
    """Return the JSON files of a folder's checkpoints, newest first."""
    found = [mark for mark in Path(folder).glob("model_*.json") if _NAME.fullmatch(mark.name)]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(mark: Path) -> int:
    """Return the number of completed iterations of a checkpoint, from the name of its JSON file."""
    return int(_NAME.fullmatch(mark.name).group(1))


def trainer_file(path: Path) -> Path:
    """Return the file of the trainer's state beside a model file."""
    return path.with_name("trainer_" + path.name.removeprefix("model_"))


def _fault(mark: Path) -> str | None:
    """Return the reason why a checkpoint is not whole. None: it is whole."""
    try:
        about = read_json(mark)
        for name, size in about["files"].items():
            file = require_file(mark.with_name(name))
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            read_shapes(file)
    except CheckpointError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return "its JSON does not name its files"
    return None
