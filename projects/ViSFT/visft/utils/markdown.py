"""Arbitrary text in Markdown, shown literally in a line, a heading or a table's cell."""

import html
import re
from urllib.parse import quote

# An underscore between two letters or digits has no effect.
_SPECIAL = re.compile(r"[\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_])")


def plain(text: object) -> str:
    """Text that is shown literally, in one line."""
    return _SPECIAL.sub(r"\\\g<0>", html.escape(_one_line(text), quote=False))


def code(text: object) -> str:
    """Text as code, between more backticks than it contains."""
    text = _one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", r"\|")


def image(text: object, file: str) -> str:
    """An image with its alternative text; `file` is a path relative to the page."""
    return f"![{plain(text)}]({quote(file)})"


def row(cells: list[str]) -> str:
    """A line of a table. Cells are Markdown."""
    return f"| {' | '.join(cells)} |"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
