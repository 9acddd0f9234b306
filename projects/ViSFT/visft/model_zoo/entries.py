"""What the zoo has: `zoo.json`, the one table that MODEL_ZOO.md, downloads and hashes are made from."""

import difflib
import functools
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visft.errors import ConfigError

TABLE = Path(__file__).with_name("zoo.json")
SHIPPED = ("demoworld/weights", "visft/model_zoo/weights")
"""Folders of the weight files that come with the packages: the tower's is the demo world's, the heads are ours."""


@dataclass(frozen=True)
class Entry:
    """A weight file of the zoo. It has exactly one of `package`, `url`, `repository` and `open_clip`.

    Attributes:
        name: what it is asked for by.
        licence: of the file, as far as it is known.
        package: its path within a package, whose name comes first, for what comes with one.
        url: its address, for what lies on a server of its own.
        repository: its repository on the Hugging Face Hub; there it lies under `file`.
        open_clip: architecture and tag, for what open_clip knows where to find.
        file: its name; "" for open_clip's.
        sha256, bytes: of the file; "" and 0 where nobody has published them.
    """

    name: str
    licence: str
    package: str = ""
    url: str = ""
    repository: str = ""
    open_clip: tuple[str, str] | None = None
    file: str = ""
    sha256: str = ""
    bytes: int = field(default=0, compare=False)

    @property
    def files(self) -> tuple[str, ...]:
        """Names it may have in the cache and on a mirror. Which of its two open_clip files there is, the Hub knows."""
        return (f"{self.name}.safetensors", f"{self.name}.bin") if self.open_clip else (self.file,)

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if self.open_clip:
            return "open_clip, {} tag {}".format(*self.open_clip)
        return "the package" if self.package else self.url or f"huggingface.co/{self.repository}"


def in_package(path: str) -> Path:
    """Where a file lies that is named from its package on, as `visft/model_zoo/zoo.json`; nothing is imported."""
    package, _, rest = path.partition("/")
    return Path(importlib.util.find_spec(package).origin).parent / rest


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """`zoo.json` as it stands: `tables` (what columns MODEL_ZOO.md shows), `files` and `configs`."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All weight files by name, in the table's order."""
    known = Entry.__dataclass_fields__
    found = {}
    for row in table()["files"]:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items() if key in known}
        found[row["name"]] = Entry(**values)
    return found


def reload() -> None:
    """Read `zoo.json` again after it was written."""
    table.cache_clear()
    entries.cache_clear()


def find(name: str) -> Entry:
    """The entry of a name, or of a file's name.

    Raises:
        ConfigError: there is none; the message says the nearest, or all that come with the package.
    """
    known = entries()
    by_file = {file: entry for entry in known.values() for file in entry.files}
    entry = known.get(name) or by_file.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*known, *by_file], n=1, cutoff=0.6)
        hint = f"the nearest is `{near[0]}`; it has " if near else "it has "
        raise ConfigError(f"model_zoo has no weights `{name}`; {hint}{', '.join(known)}")
    return entry
