"""What an evaluation leaves to read: results.json, report.md, report.html, forest.png; all from the results alone."""

import base64
import html
import io
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


def write(results: dict[str, Any], folder: Path) -> None:
    """Write all four, each atomically."""
    files.write_json(folder / "results.json", results)
    image = forest_plot(results)
    if image is not None:
        with files.write_aside(folder / "forest.png") as partial:
            partial.write_bytes(image)
    for name, text in (("report.md", markdown(results)), ("report.html", page(results, image))):
        with files.write_aside(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def comparisons(results: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """Label and tables (`families`, `mean`, `benchmarks`) of each tower that was compared with the base.

    Where there is the base alone: one pair with the label None.
    """
    keys = ("families", "mean", "benchmarks")
    others = [tower["label"] for tower in results["towers"][1:]]
    if len(others) <= 1:
        return [(others[0] if others else None, {key: results[key] for key in keys})]
    return [(label, {key: results[key][label] for key in keys}) for label in others]


def markdown(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {_title(results)}", "", _towers(results), ""]
    for label, tables in comparisons(results):
        if label and len(results["towers"]) > 2:
            lines += [f"## {label}", ""]
        lines += _markdown_table(_head(label), [_cells(row, label) for row in _rows(tables)])
        lines += ["", "By benchmark:", ""]
        details = [[row["family"], *_cells(row, label, verdict=False)] for row in tables["benchmarks"]]
        lines += [*_markdown_table(["family", *_head(label, verdict=False)], details), ""]
        if label:
            lines += ["![Differences with 95 % intervals](forest.png)", ""] if label == _last(results) else []
    lines += _notes(results)
    return "\n".join(lines) + "\n"


def page(results: dict[str, Any], image: bytes | None) -> str:
    """The report as one HTML file that needs no other."""
    title = html.escape(_title(results))
    body = [f"<h1>{title}</h1>", f"<p>{html.escape(_towers(results))}</p>"]
    if image is not None:
        data = base64.b64encode(image).decode("ascii")
        body.append(f'<img alt="Differences with 95 % intervals" src="data:image/png;base64,{data}">')
    for label, tables in comparisons(results):
        if label:
            body.append(f"<h2>{html.escape(label)}</h2>")
        body.append(_html_table(_head(label), [_cells(row, label) for row in _rows(tables)]))
        body.append("<h2>By benchmark</h2>")
        details = [[row["family"], *_cells(row, label, verdict=False)] for row in tables["benchmarks"]]
        body.append(_html_table(["family", *_head(label, verdict=False)], details))
    body += [f'<p class="small">{html.escape(note)}</p>' for note in _notes(results) if note]
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def forest_plot(results: dict[str, Any]) -> bytes | None:
    """PNG: each family's difference with its interval, the mean below; None where nothing was compared."""
    shown = [(label, tables) for label, tables in comparisons(results) if label]
    if not shown or not any(_rows(tables) for _, tables in shown):
        return None
    buffer = io.BytesIO()
    figure = draw([(label, _rows(tables)) for label, tables in shown])
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def text_table(results: dict[str, Any]) -> str:
    """The families' table for a terminal."""
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
    notes = [results["rule"], ""] if len(results["towers"]) > 1 else []
    if results["left_out"]:
        left = "; ".join(f"{name} ({reason})" for name, reason in results["left_out"].items())
        notes += [f"Not run: {left}.", ""]
    _, tables = comparisons(results)[0]
    for row in tables["benchmarks"]:
        if row.get("baselines"):
            said = ", ".join(f"{name} {value:.1f}" for name, value in row["baselines"].items())
            notes += [f"Without a tower, {row['name']}: {said}.", ""]
    return notes


def _last(results: dict[str, Any]) -> str:
    return results["towers"][-1]["label"]


def _rows(tables: dict[str, Any]) -> list[dict[str, Any]]:
    return [*tables["families"], *([tables["mean"]] if tables["mean"] else [])]


def _head(label: str | None, verdict: bool = True) -> list[str]:
    if label is None:
        return ["", "metric", "figure", "n"]
    return [
        "",
        "metric",
        "base",
        "tuned",
        "difference",
        "95 % interval",
        *(["verdict"] if verdict else []),
        "n",
    ]


def _cells(row: dict[str, Any], label: str | None, verdict: bool = True) -> list[str]:
    name = f"{row['name']} (in-domain)" if row.get("in_domain") else row["name"]
    if label is None:
        return [name, row["metric"], f"{row['base']:.2f}", str(row["n"])]
    cells = [name, row["metric"], f"{row['base']:.2f}", f"{row['tuned']:.2f}", f"{row['difference']:+.2f}"]
    cells.append(f"{row['low']:+.2f} to {row['high']:+.2f}")
    return [*cells, *([row["verdict"] or ""] if verdict else []), str(row["n"])]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|".join("---" if name in ("", "metric", "family", "verdict") else "---:" for name in head)
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = {i for i, name in enumerate(head) if name in ("", "metric", "family", "verdict")}
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        cells = ""
        for i, cell in enumerate(row):
            kind = (
                f"words {cell}"
                if i in words and cell in ("better", "worse")
                else "words"
                if i in words
                else ""
            )
            cells += f'<td class="{kind}">{html.escape(cell)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"
