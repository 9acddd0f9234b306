"""Where the zoo's files lie on this machine."""

import os
from pathlib import Path

from visft.model_zoo.entries import Entry, in_package


def folder() -> Path:
    """`$VISFT_CACHE`; else `visft` in `$FVCORE_CACHE`, in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if os.environ.get("VISFT_CACHE"):
        return Path(os.environ["VISFT_CACHE"]).expanduser()
    for variable in ("FVCORE_CACHE", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "visft"
    return Path.home() / ".cache" / "visft"


def present(entry: Entry) -> Path | None:
    """Where the file lies, in the package or in the cache, unchecked; None when it has not been downloaded."""
    if entry.package:
        path = in_package(entry.package)
        return path if path.is_file() else None
    return next((path for path in (folder() / file for file in entry.files) if path.is_file()), None)
