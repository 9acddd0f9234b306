"""The tables of MODEL_ZOO.md, made from `zoo.json`. Each stands between two comments, the first with its name."""

import json
import re
from pathlib import Path
from typing import Any

from visft.errors import ConfigError
from visft.model_zoo import entries
from visft.utils import markdown

DOCUMENT = Path(__file__).parents[4] / "MODEL_ZOO.md"

_BLOCK = re.compile(r"<!-- zoo: (\S+) -->\n(.*?)<!-- /zoo -->", re.S)
_FIGURE = "figures."


def render(name: str) -> str:
    """The Markdown table `name`, with rows in the order of `zoo.json` and columns by its `tables`."""
    data = entries.table()
    columns = data["tables"][name]
    rows = [row for row in (*data["files"], *data["configs"]) if row["table"] == name]
    head = [markdown.row([title for title, _ in columns]), f"|{'---|' * len(columns)}"]
    lines = [markdown.row([_cell(row, key) for _, key in columns]) for row in rows]
    return "".join(f"{line}\n" for line in (*head, *lines))


def _cell(row: dict[str, Any], key: str) -> str:
    if key.startswith(_FIGURE):
        value = row.get("figures", {}).get(key.removeprefix(_FIGURE))
        return "" if value is None else f"{value:g}"
    value = row.get(key, "")
    if key == "name":
        return f"`{value}`" if row in entries.table()["files"] else f"[`{value}`]({_config_file(value)})"
    if key == "sha256":
        return f"`{value}`" if value else "recorded at first download"
    if key == "bytes":
        return f"{value / 1e6:.1f} MB" if value else ""
    if key == "command":
        return f"`{value}`" if value else ""
    if key == "source":
        return _link(row)
    return str(value)


def _config_file(name: str) -> str:
    return f"configs/{name}.py" if name.startswith("lazy/") else f"configs/{name}.yaml"


def _link(row: dict[str, Any]) -> str:
    """A link to a file, or to a page about it."""
    if "repository" in row:
        return f"[{row['repository']}](https://huggingface.co/{row['repository']}/blob/main/{row['file']})"
    if "open_clip" in row:
        return "open_clip: `{}`, tag `{}`".format(*row["open_clip"])
    return f"[{row['url'].split('/')[2]}]({row['url']})" if "url" in row else "the package"


def filled(text: str) -> str:
    """A document with new tables between its comments.

    Raises:
        ConfigError: the document's places are not those of the tables.
    """
    known, places = list(entries.table()["tables"]), [name for name, _ in _BLOCK.findall(text)]
    if sorted(places) != sorted(known) or text.count("<!-- zoo: ") != len(places):
        raise ConfigError(
            f"{DOCUMENT.name}: has places for the tables {', '.join(places)}; expected one each, `<!-- zoo: NAME -->` "
            f"to `<!-- /zoo -->`, for {', '.join(known)}"
        )
    return _BLOCK.sub(lambda place: f"<!-- zoo: {place[1]} -->\n{render(place[1])}<!-- /zoo -->", text)


def check(document: Path = DOCUMENT) -> None:
    """Raise ConfigError, with the tables' names, if the document's tables differ from `zoo.json`."""
    text = _read(document)
    there = dict(_BLOCK.findall(text))
    stale = [name for name, body in _BLOCK.findall(filled(text)) if there[name] != body]
    if stale:
        raise ConfigError(
            f"{document}: differs from {entries.TABLE.name} in {', '.join(stale)}; `tools/model_zoo.py table --write` "
            "makes its tables anew"
        )


def write(document: Path = DOCUMENT) -> bool:
    """Update the document's tables; returns whether anything changed."""
    from visft.checkpoint import files

    text = _read(document)
    new = filled(text)
    if new != text:
        files.write_text(document, new)
    return new != text


def rehash() -> list[str]:
    """Put size, SHA-256 and figures of the package's files into `zoo.json`; returns the names of changed entries.

    Figures come from a file's metadata, as far as its table shows them.

    Raises:
        ConfigError: a file of the package has no row.
        CheckpointError: a file is missing or cut off.
    """
    from visft.checkpoint import files

    data = json.loads(entries.TABLE.read_text(encoding="utf-8"))
    listed, changed = {row.get("package") for row in data["files"]}, []
    for folder in entries.SHIPPED:
        for path in sorted(entries.in_package(folder).glob("*.safetensors")):
            if f"{folder}/{path.name}" not in listed:
                raise ConfigError(
                    f"{entries.TABLE}: has no row with `package` {folder}/{path.name}; copy the row of another such "
                    "file and change its words"
                )
    for row in data["files"]:
        if "package" not in row:
            continue
        path = files.require_file(entries.in_package(row["package"]))
        new = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        measured = json.loads(files.read_metadata(path).get("figures", "{}"))
        shown = [
            key.removeprefix(_FIGURE) for _, key in data["tables"][row["table"]] if key.startswith(_FIGURE)
        ]
        figures = {key: round(measured[key], 1) for key in shown if measured.get(key) is not None}
        if figures:
            new["figures"] = figures
        if any(row.get(key) != value for key, value in new.items()):
            row.update(new)
            changed.append(row["name"])
    if changed:
        files.write_text(entries.TABLE, dumps(data))
        entries.reload()
    return changed


def dumps(data: dict[str, Any]) -> str:
    """`zoo.json`'s layout: a line per column, and for each file or config a line per value."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    # Pairs of words stay on one line.
    return re.sub(r"\[\s+(\"[^\"]*\",)\s+(\"[^\"]*\")\s+\]", r"[\1 \2]", text) + "\n"


def _read(document: Path) -> str:
    if not document.is_file():
        raise ConfigError(f"{document}: there is no such file; MODEL_ZOO.md is in a checkout of visft alone")
    return document.read_text(encoding="utf-8")
