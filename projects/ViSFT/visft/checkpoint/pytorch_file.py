"""PyTorch's files, of which only tensors are built."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from visft.checkpoint.damage import cut_off, is_torchscript, names_code
from visft.errors import CheckpointError

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def is_archive(path: Path) -> bool:
    """Whether a file is of PyTorch's zip format, which can be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def load(path: Path, *, mmap: bool) -> Any:
    """Return the content of a file, on the CPU.

    Args:
        mmap: map the tensors into memory if the format allows it.

    Raises:
        CheckpointError: the file is cut off, or has pickled objects other than tensors.
    """
    mmap = mmap and is_archive(path)
    try:
        with warnings.catch_warnings():
            # Advice on pickle protocols, which the user of a file cannot follow.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if is_torchscript(path):
            raise CheckpointError(
                f"{path}: is a TorchScript archive, which holds code beside weights, so it was not loaded; give a "
                "safetensors file or a .pt file of tensors alone (of OpenAI's models, the tag `openai`)."
            ) from error
        if not isinstance(error, pickle.UnpicklingError):
            raise cut_off(path, error) from error
        found = _GLOBAL.search(str(error))
        if found is None and not names_code(path):
            raise cut_off(path, error) from error
        what = f" ({found.group(1)})" if found else ""
        raise CheckpointError(
            f"{path}: holds pickled objects other than tensors{what}; such a file can run code, so it was not "
            "loaded: use a safetensors file, or a .pt file of tensors alone."
        ) from error
    except Exception as error:
        # A damaged archive fails in many ways (RuntimeError, EOFError, KeyError, UnicodeDecodeError, ...).
        raise cut_off(path, error) from error
