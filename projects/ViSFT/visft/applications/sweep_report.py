"""What a sweep leaves to look at: results.json, table.md, sweep.png."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft.checkpoint import files
from visft.utils import markdown
from visft.visualization.run_report import write_atomically

logger = logging.getLogger(__name__)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write all three, each atomically; the image as soon as there is a finished run."""
    files.write_json(folder / "results.json", results)
    write_atomically(folder / "table.md", table(results) + "\n")
    if any(run["figures"] and run["untuned"] for run in results["runs"]):
        _draw(results, folder / "sweep.png")


def differences(results: dict[str, Any], name: str, amount: str, figure: str) -> list[float]:
    """By how much a run's figure is above the untuned tower's, one number a seed that has both."""
    found = []
    for run in results["runs"]:
        after, before = run["figures"].get(amount, {}).get(figure), (run["untuned"] or {}).get(figure)
        if run["name"] == name and after is not None and before is not None:
            found.append(after - before)
    return found


def table(results: dict[str, Any]) -> str:
    """Figures of the untuned tower, and each run's difference from them, as Markdown."""
    measure, amounts = results["measure"], [f"{amount:g}" for amount in results["interpolate"]]
    seeds = len({run["seed"] for run in results["runs"]})
    lines = [
        f"Points of difference from the untuned tower; mean{' ± standard deviation' if seeds > 1 else ''} over "
        f"{seeds} seed{'s' if seeds > 1 else ''}.",
        "",
        markdown.row(["run", *map(markdown.plain, measure), "seconds"]),
        f"|---|{'---:|' * (len(measure) + 1)}",
        f"| the untuned tower | {' | '.join(_untuned(results, figure) for figure in measure)} | |",
    ]
    for name in _names(results):
        runs = [run for run in results["runs"] if run["name"] == name]
        for amount in amounts:
            label = name if len(amounts) == 1 else f"{name}, interpolated {amount}"
            cells = [_cell(differences(results, name, amount, figure)) for figure in measure]
            seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
            took = f"{sum(seconds) / len(seconds):.0f}" if seconds and amount == amounts[-1] else ""
            lines.append(markdown.row([markdown.plain(label), *cells, took]))
        for run in runs:
            if run["status"] == "failed":
                failure = markdown.plain(f"{name}, seed {run['seed']} failed: {run['error']}")
                lines.append(markdown.row([failure, *[""] * (len(measure) + 1)]))
    return "\n".join(lines)


def _untuned(results: dict[str, Any], figure: str) -> str:
    values = [(run["untuned"] or {}).get(figure) for run in results["runs"]]
    values = [value for value in values if value is not None]
    return f"{sum(values) / len(values):.2f}" if values else ""


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.2f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:+.2f} ± {deviation:.2f}"


def _names(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["name"] for run in results["runs"]))


def _draw(results: dict[str, Any], path: Path) -> None:
    """A panel a figure: the runs' differences from the untuned tower; below, along the interpolation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, measure = _names(results), results["measure"]
    amounts = [f"{amount:g}" for amount in results["interpolate"]]
    rows = 2 if len(amounts) > 1 else 1
    height = 1.4 + 0.35 * len(names)
    figure = Figure(
        figsize=(1.5 + 3.2 * len(measure), height + (3.4 if rows == 2 else 0)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    ratios = [height, 3.4][:rows]
    panels = figure.subplots(rows, len(measure), squeeze=False, gridspec_kw={"height_ratios": ratios})
    for column, name in enumerate(measure):
        _draw_runs(panels[0][column], results, name, names, amounts[-1], labelled=column == 0)
        if rows == 2:
            _draw_interpolation(panels[1][column], results, name, names, amounts, labelled=column == 0)
    if rows == 2:
        panels[1][0].legend(fontsize=7)
    figure.suptitle("Difference from the untuned tower (points)", fontsize=10)
    with files.write_aside(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw_runs(axes, results, figure: str, names: Sequence[str], amount: str, labelled: bool) -> None:
    for row, name in enumerate(names):
        values = differences(results, name, amount, figure)
        if not values:
            axes.text(0, row, "not measured", fontsize=7, va="center", color="0.5")
            continue
        mean = sum(values) / len(values)
        colour = "tab:green" if mean > 0 else "tab:red"
        axes.barh(row, mean, height=0.6, color=colour, alpha=0.35)
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=4)
        axes.annotate(
            f"{mean:+.1f}", (mean, row), xytext=(3 if mean >= 0 else -3, 7), textcoords="offset points", fontsize=7,
            ha="left" if mean >= 0 else "right", va="center",
        )  # fmt: skip
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_title(figure, fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _draw_interpolation(axes, results, figure: str, names, amounts: Sequence[str], labelled: bool) -> None:
    for name in names:
        points = [(0.0, 0.0)]
        for amount in amounts:
            values = differences(results, name, amount, figure)
            if values:
                points.append((float(amount), sum(values) / len(values)))
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel("interpolation (0: base, 1: tuned)", fontsize=8)
    if labelled:
        axes.set_ylabel("points", fontsize=8)
    axes.grid(alpha=0.3)
