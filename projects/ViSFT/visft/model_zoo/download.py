"""One file over HTTP: with progress, continued where it broke off, written aside, renamed once it has been checked."""

import http.client
import json
import logging
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from tqdm import tqdm

from ..checkpoint import files
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often in a row a transfer may fail without having brought a byte."""

_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 1 << 20


class NotThere(CheckpointError):
    """The server says that it has no such file."""


class _Broken(Exception):
    """The transfer failed in a way that another attempt may mend."""


def download(
    url: str,
    path: str | os.PathLike,
    *,
    check: Callable[[Path], object],
    headers: Mapping[str, str] | None = None,
    size: int = 0,
    attempts: int = ATTEMPTS,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> None:
    """Download `url` to `path`.

    What has come lies in a hidden file beside `path` until it is whole, and stays there when the connection breaks or
    the process is killed: the next call asks for the rest (HTTP ranges), if the server can say that the file is still
    the same, and else begins anew. One process at a time: the caller locks.

    Args:
        check: called with the whole hidden file before it gets its name; raises where it is not the one expected.
        headers: sent to the host of `url` alone, not to one that it redirects to.
        size: in bytes, where known; 0: not known.
        attempts: how many failures without progress in a row end it; between them it waits `pause` seconds,
            doubled each time.
        timeout: seconds without an answer or a byte.

    Raises:
        NotThere: 404 or 410.
        CheckpointError: another refusal, too many failures, no room on the disk, or what `check` raises; then
            nothing has the name `path`.
    """
    part = _Part(Path(path), url)
    failures, most = 0, part.size
    while True:
        try:
            _transfer(url, part, dict(headers or {}), size, timeout)
            break
        except _Broken as error:
            # Against the most there ever was: a server that always begins anew must not keep us for ever.
            failures, most = (0, part.size) if part.size > most else (failures + 1, most)
            if failures >= attempts:
                raise CheckpointError(
                    f"{url}: the download of {part.path.name} broke off ({error}), {attempts} times in a row "
                    f"without a new byte; {_megabytes(part.size)} are kept, and the next attempt goes on from there."
                ) from error
            logger.warning("%s: %s after %s; trying again", url, error, _megabytes(part.size))
            time.sleep(min(pause * 2**failures, 30.0))
    if not part.size:
        part.remove()
        raise CheckpointError(f"{url}: is empty (0 bytes), {part.path.name} was expected; it is not kept.")
    try:
        check(part.file)
    except CheckpointError:
        part.remove()
        raise
    part.finish()


class _Part:
    """The hidden file that a download grows in, and beside it what tells whether the server still has the same file."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.file = path.with_name(f".{path.name}.download")
        self.note = path.with_name(f".{path.name}.download.json")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def validator(self) -> str:
        """The ETag or date that the server gave for the bytes at hand; "" when they cannot be continued."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        return note["validator"] if note.get("url") == self.url and self.size else ""

    def restart(self, validator: str) -> None:
        self.file.write_bytes(b"")
        files.write_json(self.note, {"url": self.url, "validator": validator})

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def finish(self) -> None:
        with open(self.file, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.file, self.path)
        self.note.unlink(missing_ok=True)
        files.sync_folder(self.path.parent)


def _transfer(url: str, part: _Part, headers: dict[str, str], size: int, timeout: float) -> None:
    """One request: append what comes to the part. Returns when it is whole."""
    validator = part.validator()
    try:
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "visft"})
        for name, value in headers.items():
            request.add_unredirected_header(name, value)
        if validator:
            request.add_header("Range", f"bytes={part.size}-")
            request.add_header("If-Range", validator)
        with _OPENER.open(request, timeout=timeout) as response:
            total = _begin(url, response, part, size)
            if not _enough_room(part, total):
                raise CheckpointError(
                    f"{url}: {part.path.name} needs {_megabytes(total - part.size)} more in {part.path.parent}, where "
                    f"{_megabytes(shutil.disk_usage(part.path.parent).free)} are free; make room, or set VISFT_CACHE."
                )
            _receive(response, part, total)
    except (http.client.InvalidURL, ValueError) as error:
        raise CheckpointError(f"{url}: is no address that can be downloaded from ({error}).") from error
    except urllib.error.HTTPError as error:
        with error:
            _refused(url, error, part)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise CheckpointError(
                f"{url}: the server's certificate is not valid ({error.reason})."
            ) from error
        raise _Broken(f"no connection: {error.reason}") from error
    except TimeoutError as error:
        raise _Broken(f"no byte for {timeout:g} s") from error
    except (ConnectionError, http.client.HTTPException, ssl.SSLError) as error:
        raise _Broken(f"connection lost: {type(error).__name__}") from error


def _begin(url: str, response: http.client.HTTPResponse, part: _Part, size: int) -> int:
    """Make the part ready for the answer's bytes; returns the whole file's size, 0 where the server does not say."""
    if response.headers.get_content_type() == "text/html":
        raise CheckpointError(
            f"{url}: answers with a web page instead of {part.path.name}; open it in a browser to see what it asks for."
        )
    if response.status == 206:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not given or int(given[1]) != part.size:
            part.remove()
            raise _Broken("the server sent another range than asked for")
        total = int(given[2])
        logger.info("%s: going on at %s of %s", url, _megabytes(part.size), _megabytes(total))
    else:
        etag = response.headers.get("ETag", "")
        # A weak ETag does not promise the same bytes.
        part.restart(
            etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        )
        total = int(response.headers.get("Content-Length") or 0)
        logger.info("%s: downloading %s to %s", url, _megabytes(total) if total else "it", part.path)
    if size and total and total != size:
        part.remove()
        raise CheckpointError(
            f"{url}: has {total} bytes, {part.path.name} should have {size}; it is another file, and is not downloaded."
        )
    return total


def _receive(response: http.client.HTTPResponse, part: _Part, total: int) -> None:
    shown = sys.stderr.isatty()
    bar = tqdm(
        total=total or None,
        initial=part.size,
        unit="B",
        unit_scale=True,
        desc=part.path.name,
        mininterval=0.5 if shown else 60.0,  # a log file wants few lines
    )
    with bar, open(part.file, "ab", buffering=0) as file:
        while chunk := response.read1(_CHUNK):
            _write(file, chunk, part)
            bar.update(len(chunk))
    if total and part.size < total:
        raise _Broken(f"the server closed the connection at {part.size} of {total} bytes")
    if total and part.size > total:
        part.remove()
        raise _Broken(f"the server sent more than its {total} bytes")


def _write(file: IO[bytes], chunk: bytes, part: _Part) -> None:
    try:
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise CheckpointError(
            f"{part.file}: cannot be written ({error.strerror}); make room, or set VISFT_CACHE to another folder. What "
            "came is kept, and continued next time."
        ) from error


def _refused(url: str, error: urllib.error.HTTPError, part: _Part) -> None:
    if error.code == 416:  # nothing is left to send, or the file has become shorter
        if error.headers.get("Content-Range") == f"bytes */{part.size}":
            return
        part.remove()
        raise _Broken("the server's file is shorter than what came before") from error
    if error.code in _PASSING:
        raise _Broken(f"status {error.code} {error.reason}") from error
    if error.code in (404, 410):
        raise NotThere(
            f"{url}: the server has no such file (status {error.code}); {part.path.name} was moved, or the mirror "
            "lacks it."
        ) from error
    if error.code in (401, 403):
        raise CheckpointError(
            f"{url}: may not be downloaded (status {error.code}); where it needs an account on the Hugging Face Hub, "
            "set HF_TOKEN."
        ) from error
    raise CheckpointError(f"{url}: status {error.code} {error.reason}, a file was expected.") from error


def _enough_room(part: _Part, total: int) -> bool:
    return total - part.size <= shutil.disk_usage(part.path.parent).free


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, 308 too (which it learnt in 3.11), but never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise CheckpointError(
                f"{req.full_url}: redirects to {newurl}, which is not encrypted; not followed."
            )
        if code == 308:
            code = 307
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


_OPENER = urllib.request.build_opener(_Redirects())
