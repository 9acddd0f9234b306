"""Downloads of the zoo's files into a cache folder, and the record of their hashes."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from visft.checkpoint import files
from visft.errors import CheckpointError, ConfigError
from visft.model_zoo.entries import Entry, in_package
from visft.model_zoo.places import folder, present

logger = logging.getLogger(__name__)

RECORD = "zoo.lock.json"
"""File in the cache folder: SHA-256, size, time and address of everything that was ever downloaded."""

MIRROR = "VISFT_ZOO_MIRROR"
"""Environment variable: an address or folder with the zoo's files under their names, the only source if set."""

_YES = ("1", "on", "true", "yes")


class NotThere(CheckpointError):
    """The server has no such file."""


def offline() -> bool:
    """Whether `VISFT_OFFLINE` or `HF_HUB_OFFLINE` forbids network access."""
    return any(os.environ.get(name, "").lower() in _YES for name in ("VISFT_OFFLINE", "HF_HUB_OFFLINE"))


def fetch(entry: Entry, *, again: bool = False) -> Path:
    """The file, downloaded if necessary, with its SHA-256 checked.

    A downloaded file is hashed once, and again if its size or time has changed. If the zoo's table has no SHA-256, the
    first download is recorded and later ones must equal it; the Hub's SHA-256 is checked too if it states one.
    Processes that want the same file wait for the one that downloads it.

    Args:
        again: download it even if it is there.

    Raises:
        CheckpointError: it cannot be downloaded, or has another SHA-256.
    """
    if entry.package:
        return verify(entry)
    path = present(entry)
    if path and not again and _unchanged(entry, path.name, path):
        return path
    for file in entry.files:
        with _locked(folder() / file):
            if not again:
                if path := present(entry):  # perhaps by another process
                    return _checked(entry, path.name, path, "found in the cache")
                if path := _in_hub_cache(entry, file):
                    return _checked(entry, file, path, "the Hub's cache")
            _refuse_offline(entry)
            try:
                return _download(entry, file)
            except NotThere:
                if file == entry.files[-1]:
                    raise
    raise AssertionError("unreachable: the last file returns or raises")


def verify(entry: Entry) -> Path:
    """Hash the local file and compare.

    Raises:
        CheckpointError: it is not there, or has changed.
    """
    path = present(entry)
    if path is None:
        where = in_package(entry.package) if entry.package else folder() / entry.files[0]
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
    """Download one of `entry.files`, which gets its name once its SHA-256 is right."""
    path, mirror = folder() / file, os.environ.get(MIRROR, "").rstrip("/")
    if "://" in mirror or (entry.url and not mirror):
        url = f"{mirror}/{quote(file)}" if mirror else entry.url
        _from_address(entry, file, url)
    elif mirror:
        _from_folder(entry, file, f"{mirror}/{file}")
    else:
        _from_hub(entry, file)
    logger.info("visft://%s is in %s", entry.name, path)
    return path


def _from_address(
    entry: Entry, file: str, url: str, *, headers: dict | None = None, stated: str = "", version: str = ""
) -> None:
    """Download over HTTP by the Hub's client, which retries broken connections.

    Args:
        stated: the SHA-256 that the server states.
        version: identifies the content of the file. If given, a partial download is kept and continued.
    """
    from huggingface_hub.file_download import http_get

    version = (entry.sha256 or version)[:16]
    aside = folder() / f".{file}{'.' if version else ''}{version}.download"
    try:
        with open(aside, "r+b" if version and aside.exists() else "wb") as part:
            http_get(
                url, part, resume_size=part.seek(0, os.SEEK_END), headers=headers, displayed_filename=file
            )
    except Exception as error:  # of whatever HTTP library this version of the Hub's client uses
        status = getattr(getattr(error, "response", None), "status_code", 0)
        kept = "What came is kept, and continued"
        if not version or not aside.stat().st_size:
            kept = "Nothing is kept"
            aside.unlink(missing_ok=True)
        if status in (404, 410):
            raise NotThere(f"{url}: the server has no such file (status {status}).") from error
        raise CheckpointError(
            f"{url}: cannot be downloaded to {folder() / file} ({_cause(error)}). {kept}; run the same command again."
        ) from error
    try:
        _accept(entry, file, aside, url=url, stated=stated, fresh=True)
        os.replace(aside, folder() / file)
    finally:
        aside.unlink(missing_ok=True)


def _from_folder(entry: Entry, file: str, source: str) -> None:
    """Copy from a mirror that is a folder."""
    try:
        with files.write_aside(folder() / file) as partial:
            shutil.copyfile(source, partial)
            _accept(entry, file, partial, url=source, fresh=True)
    except FileNotFoundError as error:
        raise NotThere(f"{source}: the mirror has no such file.") from error
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be copied to {folder() / file} ({error}).") from error


def _from_hub(entry: Entry, file: str) -> None:
    import huggingface_hub as hub
    from huggingface_hub.utils import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    repository, name = hub_file(entry, file)
    url = hub.hf_hub_url(repository, name, endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        etag = hub.get_hf_file_metadata(url, token=hub.get_token()).etag or ""
    except EntryNotFoundError as error:
        raise NotThere(f"{url}: the repository {repository} has no file {name}.") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"{url}: the Hub does not give {name} out (the repository {repository} is gone, private, or wants its "
            "terms accepted); look at it in a browser, and set HF_TOKEN to a token of an account that may read it."
        ) from error
    except Exception as error:  # of whatever HTTP library this version of the Hub's client uses
        raise CheckpointError(
            f"{url}: the Hub does not answer ({_cause(error)}); run the same command again."
        ) from error
    # The ETag of a large file is its SHA-256; a small one has git's hash, of another length.
    stated = etag if re.fullmatch("[0-9a-f]{64}", etag) else ""
    headers = hub.utils.build_hf_headers(token=hub.get_token())
    _from_address(entry, file, url, headers=headers, stated=stated, version=etag)


def _cause(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def hub_file(entry: Entry, file: str) -> tuple[str, str]:
    """Repository on the Hugging Face Hub, and the name there of `file`, one of `entry.files`."""
    if not entry.open_clip:
        return entry.repository, entry.file
    from visft.checkpoint.open_clip_models import open_clip

    name, tag = entry.open_clip
    address = (open_clip().get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")
    repository, _, inner = address.rpartition("/")
    if not repository or inner:
        raise ConfigError(
            f"visft://{entry.name}: this open_clip does not say where on the Hub the tag {tag} of {name} lies; "
            "install a newer open_clip_torch."
        )
    kinds = {".safetensors": "open_clip_model.safetensors", ".bin": "open_clip_pytorch_model.bin"}
    return repository, kinds[os.path.splitext(file)[1]]


def _accept(entry: Entry, file: str, path: Path, *, url: str, stated: str = "", fresh: bool = False) -> None:
    """Hash a file, compare it with the first known SHA-256, and record it.

    Args:
        url: where it came from. stated: the SHA-256 that the Hub states.
        fresh: it has just been downloaded and does not have its name yet.
    """
    digest = files.sha256(path)
    known = _records().get(file, {})
    first = f"by its first download (if it was rightly replaced, delete it from {folder() / RECORD})"
    witnesses = [(entry.sha256, "by the zoo's table"), (known.get("sha256"), first), (stated, "by the Hub")]
    expected, witness = next(((sha, who) for sha, who in witnesses if sha), (digest, ""))
    if fresh:
        _refuse_page(path, file, url)
    if digest != expected:
        what = f"{url}: what came for {file}" if fresh else str(path)
        todo = "nothing of it was kept" if fresh else "it was changed since: remove it, and download it again"
        raise CheckpointError(f"{what} has SHA-256 {digest}, expected {expected} {witness}; {todo}.")
    _record(file, path, digest, url if fresh else known.get("url", url))


def _refuse_page(path: Path, file: str, url: str) -> None:
    """Refuse the web pages of sign-in forms and proxies, which must not be recorded as a first download."""
    with open(path, "rb") as opened:
        start = opened.read(64).lstrip().lower()
    if not start or start.startswith((b"<!doctype", b"<html")):
        found = "a web page" if start else "an empty file"
        raise CheckpointError(f"{url}: answers with {found} instead of {file}; it is not kept.")


def _records() -> dict[str, Any]:
    path = folder() / RECORD
    return files.read_json(path) if path.is_file() else {}


def _record(file: str, path: Path, digest: str, url: str) -> None:
    stat = path.stat()
    row = {"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "url": url}
    if _records().get(file) == row:
        return
    with _locked(folder() / RECORD):
        files.write_json(folder() / RECORD, {**_records(), file: row})


def _checked(entry: Entry, file: str, path: Path, url: str) -> Path:
    """`path`, hashed unless it has been before."""
    if not _unchanged(entry, file, path):
        _accept(entry, file, path, url=url)
    return path


def _unchanged(entry: Entry, file: str, path: Path) -> bool:
    """Whether a file has the size and time that were recorded when it was hashed."""
    row = _records().get(file)
    if not row or entry.sha256 not in ("", row["sha256"]):
        return False
    stat = path.stat()
    return (row["bytes"], row["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


def _in_hub_cache(entry: Entry, file: str) -> Path | None:
    """The same file in the Hub's own cache, from open_clip or another program."""
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
def _locked(path: Path) -> Iterator[None]:
    """Exclude other processes. The system releases the lock of a process that dies."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"{path.parent}: cannot be written to or locked ({error.strerror}); set VISFT_CACHE to a folder of yours."
        ) from error
    try:
        yield
    finally:
        lock.release()
