"""The folder for files that can be rebuilt."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`visft` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "visft"
