"""Files of tensors and JSON: read without running code in them, written to a temporary file and renamed."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from visft.checkpoint import pytorch_file
from visft.checkpoint.damage import fault
from visft.errors import CheckpointError

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"
"""Suffix of files that are being written. Their names also begin with a dot."""

_NESTS = ("state_dict", "model", "module", "model_state_dict", "ema", "model_ema", "state_dict_ema")
"""Keys below which training programs save a model's tensors."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to every name."""

_TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in safetensors files, in the order that safetensors writes them in."""


@contextlib.contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`; rename it to `path` when the block ends well.

    The file and its folder are synced first, so that after a crash at any moment `path` is either what it was
    before or whole. When the block raises, the temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        os.chmod(partial, mode)  # safetensors writes files that other users may not read
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def folder_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Make an empty folder beside `path`, for files that are checked before `put_in_place` moves them.

    It is removed at the end. So are folders that killed writers of the same path left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    folder = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Sync a file and rename it to `target` on the same disk. A crash leaves the old or the new `target`."""
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    sync_folder(Path(target).parent)


def sync_folder(folder: str | os.PathLike) -> None:
    """Sync a folder, so that its renames and removals survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove the half-written files and folders that a killed writer left in `folder`, and return their names."""
    leftovers = sorted(Path(folder).glob(f".*{PARTIAL_SUFFIX}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return [leftover.name for leftover in leftovers]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically."""
    with write_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write JSON (two spaces, a final newline) atomically."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        raise CheckpointError(
            f"{path}: is no valid JSON ({error}){'; it was cut off' if cut else ''}; write or fetch it again."
        ) from error


@dataclass(frozen=True)
class Lazy:
    """A tensor for a file, whose values are read or computed only when they are written.

    Attributes:
        dtype, shape: of the tensor.
        parts: yields its values in order, as flat pieces, anew in every call.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]


def parts(tensor: Tensor | Lazy) -> Iterator[Tensor]:
    """Yield a tensor's values in order, flat, on the CPU."""
    if isinstance(tensor, Lazy):
        return tensor.parts()
    return iter([tensor.detach().cpu().contiguous().view(-1)])


def nbytes(tensor: Tensor | Lazy) -> int:
    """Return the number of bytes of its values."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor | Lazy], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically, one at a time, on any device and with any strides.

    The bytes equal those of safetensors' own writer, which holds all tensors in memory and shuffles the metadata.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission), or safetensors has no such type.
    """
    odd = next((name for name in tensors if tensors[name].dtype not in _TYPES), None)
    if odd is not None:
        raise CheckpointError(
            f"{path}: {odd} is of {tensors[odd].dtype}, which safetensors files do not hold."
        )
    # Wide types first, so that every tensor is aligned to its type.
    names = sorted(tensors, key=lambda name: (list(_TYPES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + nbytes(tensors[name])
        shape, dtype = list(tensors[name].shape), _TYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with write_aside(path) as partial, open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for part in parts(tensors[name]):
                    file.write(part.view(torch.uint8).numpy())
                    del part  # before the next part, so that its mapping is released
                count = file.tell() - 8 - len(text) - header[name]["data_offsets"][0]
                if count != nbytes(tensors[name]):
                    raise CheckpointError(f"{path}: {count} bytes came of {nbytes(tensors[name])} of {name}.")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "free some space on its disk" if full else "check the folder and its permissions"
        raise CheckpointError(f"{path}: cannot be written ({error}); {todo}.") from error


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read all tensors of a safetensors or PyTorch file, on the CPU, as a flat dictionary.

    The format is told by the content, not by the name. Only tensors are ever built from a pickle. Usual wrappings are
    removed (`{"model": ...}`, `{"state_dict": ...}`, `module.` or `_orig_mod.` before every name).

    Raises:
        CheckpointError: the file is missing, empty or cut off, or has pickled objects other than tensors.
    """
    return _read(require_file(path), mapped=False)


def map_tensors(path: str | os.PathLike, *, quiet: bool = False) -> dict[str, Tensor]:
    """As `read_tensors`, but the tensors are memory-mapped: values are read when they are used.

    Files older than PyTorch's zip format cannot be mapped. They are read as a whole, which is logged.

    Args:
        quiet: log nothing, for example because the file was mapped before.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    path = require_file(path)
    if not quiet and not is_safetensors(path) and not pytorch_file.is_archive(path):
        logger.warning("%s: is of PyTorch's old format, which takes its whole size in memory", path)
    return _read(path, mapped=True, quiet=quiet)


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors in a file, without reading their values if the format allows it.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    return {name: tuple(tensor.shape) for name, tensor in _read(require_file(path), mapped=True).items()}


def _read(path: Path, *, mapped: bool, quiet: bool = False) -> dict[str, Tensor]:
    if not is_safetensors(path):
        return _flat(pytorch_file.load(path, mmap=mapped), path, quiet)
    with _open_safetensors(path) as file:
        return _without_wrappers({name: file.get_tensor(name) for name in file.keys()})


def safetensors_starts(path: str | os.PathLike) -> dict[str, int]:
    """Return the offset in a safetensors file of each tensor of `read_tensors`; `{}` for other files."""
    path = require_file(path)
    if not is_safetensors(path):
        return {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return _without_wrappers({name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()})


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the metadata in a safetensors file's header; `{}` for other files."""
    path = require_file(path)
    if not is_safetensors(path):
        return {}
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def local_path(path: str | os.PathLike) -> Path:
    """Return the local path of a path or an address of detectron2's PathManager (`visft://...`)."""
    text = os.fspath(path)
    return Path(PathManager.get_local_path(text)) if "://" in text else Path(text)


def require_file(path: str | os.PathLike) -> Path:
    """Return the path of a file, after checking that it exists and is not empty.

    Raises:
        CheckpointError: it is missing, a folder, empty, or unreadable.
    """
    path = local_path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; a weight file (.safetensors or .pt) was expected.")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such weight file; check the path.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes); fetch or write it again.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: may not be read; check its permissions.")
    return path


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: eight bytes of header length, then a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and start[:2] != b"PK")


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: is no whole safetensors file ({error}); {fault(path)}: fetch it again."
        ) from error


def _flat(content: Any, path: Path, quiet: bool = False) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}; a dictionary of named tensors was expected."
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    others = [str(name) for name in content if str(name) not in tensors]
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; a dictionary of named tensors was expected.")
    if others and not quiet:
        logger.info(
            "%s: ignored %d entries that are no tensors: %s", path, len(others), ", ".join(others[:5])
        )
    return _without_wrappers(tensors)


def _without_wrappers(named: dict[str, Any]) -> dict[str, Any]:
    while named:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w) for name in named)), None)
        if wrapper is None:
            break
        named = {name.removeprefix(wrapper): value for name, value in named.items()}
    return named
