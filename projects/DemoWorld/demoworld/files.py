"""Atomic writing of files: they are written to a temporary file, synced and renamed."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PARTIAL_SUFFIX = ".partial"
"""Suffix of files that are being written. Their names begin with a dot."""


@contextlib.contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file beside `path`. It is renamed to `path` when the block ends, and removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        os.chmod(partial, mode)  # safetensors makes files that others may not read
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove incomplete files of killed writers in `folder`."""
    for leftover in Path(folder).glob(f".*{PARTIAL_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write JSON with an indent of two spaces and a final newline."""
    with write_aside(path) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors that share no memory as safetensors. Equal tensors give equal bytes."""
    with write_aside(path) as partial:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, dict(metadata)
        )
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata by name, because safetensors writes them in random order."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
