"""What makes a run's checkpoints a model without the config and data that it was trained with.

Every model file of a run carries it in its header, so that a folder that was moved, or a stage's folder, still has it.
It names the base (see `describe_base`); the base's weights are not in it.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from visft.checkpoint.files import read_metadata
from visft.checkpoint.run_folder import run_files
from visft.errors import CheckpointError

KEY = "visft_model"
"""In a safetensors file's metadata."""

VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """What a run was trained with.

    Attributes:
        config: its whole config, nested, as YAML holds it; of the tower's own mean and standard deviation the numbers.
        classes: what its heads learnt (`visft.classes.dataset_classes.Classes`, as JSON).
        seed: from which a tower of random weights is made again.
    """

    config: dict[str, Any]
    classes: dict[str, Any]
    seed: int

    def to_metadata(self) -> dict[str, str]:
        """For the header of a file."""
        content = {"version": VERSION, "config": self.config, "classes": self.classes, "seed": self.seed}
        return {KEY: json.dumps(content)}


def read_record(path: str | os.PathLike) -> RunRecord | None:
    """What a run says of itself; None: nothing, as files of others and of older versions.

    Args:
        path: a run's OUTPUT_DIR, a stage's folder, or a file of one.

    Raises:
        CheckpointError: there is no checkpoint, or a newer version wrote it.
    """
    file = run_files(path)[-1]
    text = read_metadata(file).get(KEY)
    if text is None:
        return None
    try:
        content = json.loads(text)
        if content["version"] > VERSION:
            raise CheckpointError(
                f"{file}: was written by a newer visft (version {content['version']} of what a run says of itself; "
                f"this one knows {VERSION}); update visft."
            )
        return RunRecord(content["config"], content["classes"], content["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: what it says of its run ({KEY} in its header) cannot be read ({type(error).__name__}: {error}); "
            "copy the file again."
        ) from error
