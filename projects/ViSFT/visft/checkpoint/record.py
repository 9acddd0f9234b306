"""The record in a run's checkpoints, with which they are a model without the run's config and data.

Every model file of a run has it in its header, so that a moved folder or a stage's folder still has it. It names the
base (see `describe_base`), but does not hold its weights.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from visft.checkpoint.files import read_metadata
from visft.checkpoint.run_folder import run_files
from visft.errors import CheckpointError

KEY = "visft_model"
"""The key in a safetensors file's metadata."""

VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """Config, classes and seed of a run.

    Attributes:
        config: the whole config, nested as in YAML. The tower's own mean and standard deviation are given as numbers.
        classes: of its heads (`visft.classes.dataset_classes.Classes`, as JSON).
        seed: rebuilds a tower of random weights.
    """

    config: dict[str, Any]
    classes: dict[str, Any]
    seed: int

    def to_metadata(self) -> dict[str, str]:
        """Return the record as metadata for a file's header."""
        content = {"version": VERSION, "config": self.config, "classes": self.classes, "seed": self.seed}
        return {KEY: json.dumps(content)}


def read_record(path: str | os.PathLike) -> RunRecord | None:
    """Return the record of a run. None: there is none, as in foreign files and those of older versions.

    Args:
        path: a run's OUTPUT_DIR, a stage's folder, or a file of one.

    Raises:
        CheckpointError: there is no checkpoint, or it is of a newer version.
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
