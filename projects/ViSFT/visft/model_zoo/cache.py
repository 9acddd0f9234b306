"""The folder that the zoo's files are downloaded into once, and the record of what each of them was."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

from ..checkpoint import files
from ..errors import CheckpointError
from .download import NotThere, download
from .entries import PACKAGE, Entry
from .sources import Source, hub_file, locate

logger = logging.getLogger(__name__)

RECORD = "zoo.lock.json"
"""File name, in the cache: SHA-256, size, time and address of everything that was ever downloaded here."""

_YES = ("1", "on", "true", "yes")


def folder() -> Path:
    """`$VISFT_CACHE`; else `visft` in `$FVCORE_CACHE`, in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if os.environ.get("VISFT_CACHE"):
        return Path(os.environ["VISFT_CACHE"]).expanduser()
    for variable in ("FVCORE_CACHE", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "visft"
    return Path.home() / ".cache" / "visft"


def offline() -> bool:
    """Whether `VISFT_OFFLINE` or `HF_HUB_OFFLINE` forbids to ask the network."""
    return any(os.environ.get(name, "").lower() in _YES for name in ("VISFT_OFFLINE", "HF_HUB_OFFLINE"))


def present(entry: Entry) -> Path | None:
    """Where the file lies, in the package or in the cache, unchecked; None when it has not been downloaded."""
    if entry.package:
        path = PACKAGE / entry.package
        return path if path.is_file() else None
    return next((path for path in (folder() / file for file in entry.files) if path.is_file()), None)


def fetch(entry: Entry, *, again: bool = False) -> Path:
    """The file, downloaded if it has to be, its SHA-256 checked.

    A downloaded file is hashed once, and again when its size or time has changed since. Where the zoo's table has no
    SHA-256, the first download is trusted, unless the Hub states another for it, and recorded; all later ones must be
    equal to it. Processes that want the same file wait for the one that downloads it.

    Args:
        again: download it although it is there.

    Raises:
        CheckpointError: it cannot be had, or is not the one that it should be.
    """
    if entry.package:
        return verify(entry)
    path = present(entry)
    if path and not again and _unchanged(entry, path.name, path):
        return path
    for file in entry.files:
        with _locked(folder() / file, f"the download of {file}"):
            path = present(entry)  # another process may have been faster
            if path and not again:
                if not _unchanged(entry, path.name, path):
                    verify(entry)
                return path
            known = None if again else _in_hub_cache(entry, file)
            if known:
                if not _unchanged(entry, file, known):
                    _accept(entry, file, known, url="the Hub's cache")
                return known
            _refuse_offline(entry)
            try:
                return _download(entry, file)
            except NotThere:
                if file == entry.files[-1]:
                    raise
    raise AssertionError("unreachable: the last file returns or raises")


def verify(entry: Entry) -> Path:
    """Hash the file that is there, and compare.

    Raises:
        CheckpointError: it is not there, or has changed.
    """
    path = present(entry)
    if path is None:
        where = PACKAGE / entry.package if entry.package else folder() / entry.files[0]
        todo = (
            "install visft again" if entry.package else f"`tools/model_zoo.py download {entry.name}` gets it"
        )
        raise CheckpointError(f"{where}: there is no such file; {todo}.")
    if not entry.package:
        _accept(entry, path.name, path, url="found in the cache")
        return path
    digest = files.sha256(path)
    if digest != entry.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {digest}, expected {entry.sha256}: install visft again or `git checkout` the file; "
            "if it was trained anew, `tools/model_zoo.py table --rehash --write` publishes it."
        )
    return path


def _download(entry: Entry, file: str) -> Path:
    source, path = locate(entry, file), folder() / file

    def check(part: Path) -> None:
        _accept(entry, file, part, url=source.url, stated=source.sha256, fresh=True)

    if source.url.startswith(("http://", "https://")):
        download(source.url, path, check=check, headers=source.headers, size=entry.bytes or source.bytes)
    else:
        _copy(source, path, check)
    logger.info("visft://%s is in %s", entry.name, path)
    return path


def _copy(source: Source, path: Path, check: Callable[[Path], None]) -> None:
    """From a mirror that is a folder, or any other place that detectron2's PathManager can open."""
    try:
        with PathManager.open(source.url, "rb") as file, files.write_aside(path) as partial:
            with open(partial, "wb") as copy:
                while chunk := file.read(1 << 22):
                    copy.write(chunk)
            check(partial)
    except FileNotFoundError as error:
        raise NotThere(f"{source.url}: the mirror has no such file.") from error
    except OSError as error:
        raise CheckpointError(f"{source.url}: cannot be copied to {path} ({error}).") from error


def _accept(entry: Entry, file: str, path: Path, *, url: str, stated: str = "", fresh: bool = False) -> None:
    """Hash a file, compare it with the first of those who know, and record it.

    Args:
        url: where it came from. stated: the SHA-256 that the Hub states.
        fresh: it was downloaded just now, and has not got its name yet (which changes neither size nor time).
    """
    digest = files.sha256(path)
    known = _records().get(file, {})
    record = folder() / RECORD
    expected, witness = next(
        (expected, witness)
        for expected, witness in (
            (entry.sha256, "by the zoo's table"),
            (
                known.get("sha256"),
                f"by its first download (if it was rightly replaced, delete it from {record})",
            ),
            (stated, "by the Hub"),
            (digest, "by itself"),
        )
        if expected
    )
    if digest != expected:
        what = f"{url}: what came for {file}" if fresh else str(path)
        todo = "nothing of it was kept" if fresh else "it was changed since: remove it, and download it again"
        raise CheckpointError(f"{what} has SHA-256 {digest}, expected {expected} {witness}; {todo}.")
    _record(file, path, digest, url if fresh else known.get("url", url))


def _records() -> dict[str, Any]:
    path = folder() / RECORD
    return files.read_json(path) if path.is_file() else {}


def _record(file: str, path: Path, digest: str, url: str) -> None:
    stat = path.stat()
    row = {"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "url": url}
    if _records().get(file) == row:
        return
    with _locked(folder() / RECORD, "the record"):
        files.write_json(folder() / RECORD, {**_records(), file: row})


def _unchanged(entry: Entry, file: str, path: Path) -> bool:
    """Whether a file is the very one that was hashed before, by size and time."""
    row = _records().get(file)
    if not row or entry.sha256 not in ("", row["sha256"]):
        return False
    stat = path.stat()
    return (row["bytes"], row["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


def _in_hub_cache(entry: Entry, file: str) -> Path | None:
    """The same file where open_clip or another program has downloaded it before."""
    if not (entry.repository or entry.open_clip):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(*hub_file(entry, file))
    return Path(found) if isinstance(found, str) else None


def _refuse_offline(entry: Entry) -> None:
    if offline():
        raise CheckpointError(
            f"visft://{entry.name}: is not in the cache {folder()}, and VISFT_OFFLINE or HF_HUB_OFFLINE forbids "
            f"to download it; unset it, or copy {entry.files[0]} there from a machine that has it."
        )


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Exclude other processes; the system lets go of the lock of one that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(
            f"{path.parent}: cannot be written to ({error.strerror}); set VISFT_CACHE to a folder of yours."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for %s by another process", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise CheckpointError(
                f"{path.parent}: files there cannot be locked ({error.strerror}), which keeps processes apart; set "
                "VISFT_CACHE to a folder on another disk."
            ) from error
        yield
