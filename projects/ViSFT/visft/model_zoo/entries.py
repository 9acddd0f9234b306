"""The zoo's content, `zoo.json`: the source of MODEL_ZOO.md's tables, of downloads and of hashes."""

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
"""Folders of the weight files in the packages: the demo tower's and the demo heads'."""


@dataclass(frozen=True)
class Entry:
    """A weight file of the zoo. It has exactly one of `package`, `url`, `repository` and `open_clip`.

    Attributes:
        name: unique.
        licence: of the file, as far as known.
        package: path of a file in a package, beginning with the package's name.
        url: address on another server.
        repository: on the Hugging Face Hub, where the file's name is `file`.
        open_clip: architecture and tag, which open_clip resolves.
        file: file name; "" for open_clip's.
        sha256, bytes: of the file; "" and 0 if not published.
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
        """Possible names in the cache and on a mirror. The Hub has one or both of open_clip's two."""
        return (f"{self.name}.safetensors", f"{self.name}.bin") if self.open_clip else (self.file,)

    @property
    def source(self) -> str:
        """Its origin in words."""
        if self.open_clip:
            return "open_clip, {} tag {}".format(*self.open_clip)
        return "the package" if self.package else self.url or f"huggingface.co/{self.repository}"


def in_package(path: str) -> Path:
    """Path of a package's file, as `visft/model_zoo/zoo.json`; nothing is imported."""
    package, _, rest = path.partition("/")
    return Path(importlib.util.find_spec(package).origin).parent / rest


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The content of `zoo.json`: `tables` (columns of MODEL_ZOO.md's tables), `files` and `configs`."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All weight files by name, in order."""
    known = Entry.__dataclass_fields__
    found = {}
    for row in table()["files"]:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items() if key in known}
        found[row["name"]] = Entry(**values)
    return found


def reload() -> None:
    """Read `zoo.json` anew."""
    table.cache_clear()
    entries.cache_clear()


def find(name: str) -> Entry:
    """An entry by its name or file name.

    Raises:
        ConfigError: there is none; the message lists all names and the nearest one.
    """
    known = entries()
    by_file = {file: entry for entry in known.values() for file in entry.files}
    entry = known.get(name) or by_file.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*known, *by_file], n=1, cutoff=0.6)
        hint = f"the nearest is `{near[0]}`; it has " if near else "it has "
        raise ConfigError(f"model_zoo has no weights `{name}`; {hint}{', '.join(known)}")
    return entry
