"""A forest plot: differences from a base tower with their intervals, by family, of one tower or many."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
"""A family's or the mean's, as in results.json: `name`, `difference`, `low`, `high`, perhaps `verdict`, `in_domain`."""

FEW = 6
"""Towers that can be told apart by colour in one plot; more of them have a panel a family, and their names."""

_LINEAR, _PANEL_LINEAR = 5, 2
"""Points up to which an axis is linear, where differences go far beyond: of the one plot, and of a narrow panel."""

_COLUMNS = 5
_VERDICTS = {"better": "tab:blue", "worse": "tab:red"}
_AXIS = "difference from the base tower, percentage points, 95 % interval"


def draw(towers: Sequence[tuple[str, Sequence[Row]]]) -> Any:
    """A matplotlib Figure of towers, by name, and their rows. A tower may lack families that others have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for _, of in towers for row in of]
    titles = {
        row["name"]: f"{row['name']} (in-domain)" if row.get("in_domain") else row["name"] for row in rows
    }
    names = sorted(titles, key="mean".__eq__)  # in the order that they come, the mean last
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    (_one_plot if len(towers) <= FEW else _panels)(figure, towers, {name: titles[name] for name in names})
    return figure


def _one_plot(figure: Any, towers: Sequence[tuple[str, Sequence[Row]]], titles: dict[str, str]) -> None:
    """Families below each other, a colour a tower."""
    from matplotlib import colormaps

    figure.set_size_inches(7, 1.4 + 0.3 * len(titles) * max(1, 0.7 * len(towers)))
    axes, names, step = figure.subplots(), list(titles), 0.7 / len(towers)
    for place, (label, rows) in enumerate(towers):
        offset = (place - (len(towers) - 1) / 2) * step
        for number, row in enumerate(rows):
            y = names.index(row["name"]) + offset
            _interval(axes, row, y, colormaps["tab10"].colors[place], label if number == 0 else None)
    axes.set_yticks(range(len(names)), list(titles.values()))
    axes.set_ylim(len(names) - 0.4, -0.6)
    scale = _scale(axes, [row for _, rows in towers for row in rows], _LINEAR)
    axes.set_xlabel(_AXIS + scale)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def _panels(figure: Any, towers: Sequence[tuple[str, Sequence[Row]]], titles: dict[str, str]) -> None:
    """A panel a family, towers below each other, coloured by verdict."""
    columns = min(_COLUMNS, len(titles))
    lines = -(-len(titles) // columns)
    figure.set_size_inches(2 + 2.2 * columns, lines * (1 + 0.2 * len(towers)))
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    scales = set()
    for (name, title), axes in zip(titles.items(), panels, strict=False):
        found = {place: row for place, (_, rows) in enumerate(towers) for row in rows if row["name"] == name}
        for place, row in found.items():
            _interval(axes, row, place, _VERDICTS.get(row.get("verdict"), "0.45"))
        axes.set_title(title, fontsize=10)
        scales.add(_scale(axes, list(found.values()), _PANEL_LINEAR))
    axes.set_yticks(range(len(towers)), [label for label, _ in towers], fontsize=8)
    axes.set_ylim(len(towers) - 0.4, -0.6)
    for axes in panels:  # what is left of the last line
        axes.set_axis_off()
    figure.supxlabel(f"{_AXIS}{max(scales)}; blue: better, red: worse, by the rule", fontsize=9)


def _interval(axes: Any, row: Row, y: float, colour: Any, label: str | None = None) -> None:
    axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.5)
    axes.plot(
        row["difference"],
        y,
        "D" if row["name"] == "mean" else "o",
        color=colour,
        markersize=6,
        markerfacecolor="white" if row.get("in_domain") else colour,
        label=label,
    )


def _scale(axes: Any, rows: Sequence[Row], linear: int) -> str:
    """Draw the line at 0, and make an axis of differences; returns what has to be said of it."""
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    if max(abs(row[end]) for row in rows for end in ("low", "high")) <= linear * 5:
        return ""
    # One tower that lost much would squeeze all others into a line.
    axes.set_xscale("symlog", linthresh=linear)
    axes.xaxis.set_major_formatter("{x:g}")
    return f"; logarithmic beyond {linear}"
