"""Writes results.json, report.md, report.html and forest.png from the results of an evaluation."""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demoworld import files
from towerbench.forest_plot import draw

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8885; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: left; }
.better { color: #18794e; font-weight: 600; } .worse { color: #cd2b31; font-weight: 600; }
img { max-width: 100%; height: auto; background: #fff; }
p.small { font-size: .9rem; opacity: .8; }
"""

_PLOT = "Differences with 95 % intervals"
_WORDS = ("", "metric", "family", "verdict")
"""Headings of columns without numbers."""

# An underscore between two letters or digits is not emphasis.
_SPECIAL = re.compile(r"[\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_])")


def write(results: dict[str, Any], folder: Path) -> None:
    """Write all four files, each atomically."""
    files.write_json(folder / "results.json", results)
    image = forest_plot(results)
    if image is not None:
        with files.write_aside(folder / "forest.png") as partial:
            partial.write_bytes(image)
    for name, text in (("report.md", markdown(results)), ("report.html", page(results, image))):
        with files.write_aside(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def comparisons(results: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """Return label and tables (`families`, `mean`, `benchmarks`) of each tower that was compared with the base.

    If there is only the base: one pair with the label None.
    """
    keys = ("families", "mean", "benchmarks")
    others = [tower["label"] for tower in results["towers"][1:]]
    if len(others) <= 1:
        return [(others[0] if others else None, {key: results[key] for key in keys})]
    return [(label, {key: results[key][label] for key in keys}) for label in others]


def markdown(results: dict[str, Any]) -> str:
    """Return the report as Markdown. Names are escaped."""
    lines = [f"# {_plain(_title(results))}", "", _plain(_towers(results)), ""]
    for label, tables in comparisons(results):
        if label and len(results["towers"]) > 2:
            lines += [f"## {_plain(label)}", ""]
        for title, table in _tables(label, tables):
            lines += [*([f"{title}:", ""] if title else []), *_markdown_table(*table), ""]
        if label and label == results["towers"][-1]["label"]:
            lines += [f"![{_PLOT}](forest.png)", ""]
    if len(results["towers"]) > 1:
        lines += [results["rule"], ""]
    lines += [line for note in _notes(results) for line in (_plain(note), "")]
    return "\n".join(lines) + "\n"


def page(results: dict[str, Any], image: bytes | None) -> str:
    """Return the report as one self-contained HTML page."""
    title = html.escape(_title(results))
    body = [f"<h1>{title}</h1>", f"<p>{html.escape(_towers(results))}</p>"]
    if image is not None:
        data = base64.b64encode(image).decode("ascii")
        body.append(f'<img alt="{_PLOT}" src="data:image/png;base64,{data}">')
    for label, tables in comparisons(results):
        if label:
            body.append(f"<h2>{html.escape(label)}</h2>")
        for title_of, table in _tables(label, tables):
            body += [*([f"<h2>{title_of}</h2>"] if title_of else []), _html_table(*table)]
    notes = [*([results["rule"]] if len(results["towers"]) > 1 else []), *_notes(results)]
    body += [f'<p class="small">{html.escape(note)}</p>' for note in notes]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def forest_plot(results: dict[str, Any]) -> bytes | None:
    """Return a PNG with each family's difference and interval, and the mean below. None: nothing was compared."""
    shown = [(label, tables) for label, tables in comparisons(results) if label]
    if not shown or not any(_rows(tables) for _, tables in shown):
        return None
    buffer = io.BytesIO()
    figure = draw([(label, _rows(tables)) for label, tables in shown])
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def text_table(results: dict[str, Any]) -> str:
    """Return the table of families for a terminal."""
    blocks = []
    for label, tables in comparisons(results):
        head, rows = _head(label), [_cells(row, label) for row in _rows(tables)]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if i in (0, 1) else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in [head, *rows]
        ]
        blocks.append("\n".join([label, *lines] if label and len(results["towers"]) > 2 else lines))
    return "\n\n".join(blocks)


def _title(results: dict[str, Any]) -> str:
    return f"Out-of-domain evaluation of {results['model']}"


def _towers(results: dict[str, Any]) -> str:
    towers = [
        f"{tower['label']}: {tower['weights']} (SHA-256 {tower['sha256'][:12]})"
        for tower in results["towers"]
    ]
    split = "" if results["split"] == "test" else f" Split: {results['split']}."
    return f"{'; '.join(towers)}. Seeds: {results['seeds']}.{split} Figures are percentage points; n counts items."


def _notes(results: dict[str, Any]) -> list[str]:
    notes = []
    if results["left_out"]:
        left = "; ".join(f"{name} ({reason})" for name, reason in results["left_out"].items())
        notes.append(f"Not run: {left}.")
    _, tables = comparisons(results)[0]
    for row in tables["benchmarks"]:
        if row.get("baselines"):
            said = ", ".join(f"{name} {value:.1f}" for name, value in row["baselines"].items())
            notes.append(f"Without a tower, {row['name']}: {said}.")
    return notes


def _tables(label: str | None, tables: dict[str, Any]) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """Return title, headings and rows of the table of families, and of the table of benchmarks."""
    families = [_cells(row, label) for row in _rows(tables)]
    details = [[row["family"], *_cells(row, label, verdict=False)] for row in tables["benchmarks"]]
    return [
        ("", (_head(label), families)),
        ("By benchmark", (["family", *_head(label, verdict=False)], details)),
    ]


def _rows(tables: dict[str, Any]) -> list[dict[str, Any]]:
    return [*tables["families"], *([tables["mean"]] if tables["mean"] else [])]


def _head(label: str | None, verdict: bool = True) -> list[str]:
    if label is None:
        return ["", "metric", "figure", "n"]
    last = ["verdict", "n"] if verdict else ["n"]
    return ["", "metric", "base", "tuned", "difference", "95 % interval", *last]


def _cells(row: dict[str, Any], label: str | None, verdict: bool = True) -> list[str]:
    name = f"{row['name']} (in-domain)" if row.get("in_domain") else row["name"]
    if label is None:
        return [name, row["metric"], f"{row['base']:.2f}", str(row["n"])]
    cells = [name, row["metric"], f"{row['base']:.2f}", f"{row['tuned']:.2f}", f"{row['difference']:+.2f}"]
    cells.append(f"{row['low']:+.2f} to {row['high']:+.2f}")
    return [*cells, *([row["verdict"] or ""] if verdict else []), str(row["n"])]


def _plain(text: str) -> str:
    """Escape a text for Markdown, in one line."""
    return _SPECIAL.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|".join("---" if name in _WORDS else "---:" for name in head)
    lines = [f"| {' | '.join(map(_plain, cells))} |" for cells in (head, *rows)]
    return [lines[0], f"|{rule}|", *lines[1:]]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    for row in rows:
        cells = ""
        for name, cell in zip(head, row, strict=True):
            kinds = ["words"] if name in _WORDS else []
            kinds += [cell] if name == "verdict" and cell in ("better", "worse") else []
            cells += f'<td class="{" ".join(kinds)}">{html.escape(cell)}</td>'
        lines.append(cells)
    rows_of = "\n".join(f"<tr>{cells}</tr>" for cells in lines)
    return f'<div class="scroll"><table>{rows_of}</table></div>'
