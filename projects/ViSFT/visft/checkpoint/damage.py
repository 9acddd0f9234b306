"""Finds out from its bytes why a weight file cannot be read."""

import json
import pickletools
import zipfile
from pathlib import Path

from visft.errors import CheckpointError


def names_code(path: Path) -> bool:
    """Whether a bare pickle names a function or class. It is read by opcodes; nothing is run."""
    try:
        with open(path, "rb") as file:
            return any(
                code.name in ("GLOBAL", "STACK_GLOBAL", "INST") for code, _, _ in pickletools.genops(file)
            )
    except ValueError:  # no pickle, or cut off too early
        return False


def cut_off(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a PyTorch file that cannot be read."""
    reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
    return CheckpointError(f"{path}: is no whole weight file ({reason}); {fault(path)}: fetch it again.")


def fault(path: Path) -> str:
    """Describe what is wrong with a file that cannot be read, as far as its bytes show it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(256)
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "it is a web page"
        if start.startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS, not the weights (`git lfs pull` gets them)"
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):
            return f"it was cut off after {size} bytes"
        if start[8:9] == b"{" and (length := int.from_bytes(start[:8], "little")) < 100_000_000:
            file.seek(8)
            try:
                entries = json.loads(file.read(length)).values()
                whole = 8 + length + max(entry.get("data_offsets", (0, 0))[1] for entry in entries)
            except (ValueError, AttributeError):
                whole = 8 + length
            if whole > size:
                return f"it was cut off after {size} of {whole} bytes or more"
    return "it was cut off, or is of another format"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript program. OpenAI published its models as such."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
