"""Local paths of the zoo's files."""

import os
from pathlib import Path

from visft.model_zoo.entries import Entry, in_package
from visft.utils.user_cache import cache_folder


def folder() -> Path:
    """`$VISFT_CACHE`; else `visft` in `$FVCORE_CACHE`, in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if os.environ.get("VISFT_CACHE"):
        return Path(os.environ["VISFT_CACHE"]).expanduser()
    if os.environ.get("FVCORE_CACHE"):
        return Path(os.environ["FVCORE_CACHE"]).expanduser() / "visft"
    return cache_folder()


def present(entry: Entry) -> Path | None:
    """Path of a file in the package or in the cache, unchecked; None if it has not been downloaded."""
    if entry.package:
        path = in_package(entry.package)
        return path if path.is_file() else None
    return next((path for path in (folder() / file for file in entry.files) if path.is_file()), None)
