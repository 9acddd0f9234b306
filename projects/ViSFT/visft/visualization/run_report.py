"""A run's report: report.md, report.json and the loss curves."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from visft.checkpoint import files
from visft.utils import markdown

CURVES = "loss_curves.png"

WORDS = "_words"
"""Ending of the names of word maps: images of where a caption head looked."""

logger = logging.getLogger(__name__)

_STEPS = {
    "start": "at the start, with the heads of MODEL.VISFT.HEAD_FILES",
    "heads": "after stage heads (tower as released, heads trained on it)",
    "lora": "after stage lora",
}


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Figures for JSON, which has no NaN: a metric without any object to measure is null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def finite_only(values: Mapping[str, float]) -> dict[str, float]:
    """The figures that are numbers."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def before_and_after(evaluations: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The two evaluations (of `start`, `heads`, `lora`; at least one) that a report compares.

    "Before" is the start if the run began with trained heads, else the end of stage heads, where figures of the
    released tower first mean something. "After" is the last one.
    """
    done = [step for step in _STEPS if step in evaluations]
    return done[0], done[-1]


def write_report(folder: Path, evaluations: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Write `report.json` (`{"before": {...}, "after": {...}}`, per cent) and `report.md`, the same as a table.

    Args:
        folder: OUTPUT_DIR.
        evaluations: figures by step (`start`, `heads`, `lora`), flat: `detection/bbox/AP50`, `zero_shot/top1`, ...;
            figures of single classes (`.../AP-dog`) stay in run.json.
        title: first line of the page.
    """
    if not evaluations:
        logger.info("DATASETS.TEST is empty, so there is nothing to report")
        return
    first, last = before_and_after(evaluations)
    before, after = (
        {name: value for name, value in finite(evaluations[step]).items() if "/AP-" not in name}
        for step in (first, last)
    )
    figures = {"before": before, "after": after}
    files.write_json(folder / "report.json", figures)
    lines = [
        f"# {markdown.plain(title)}",
        "",
        f"Before: {_STEPS[first]}. After: {_STEPS[last]}. Per cent.",
        "",
    ]
    lines += ["| | before | after | change |", "|---|---:|---:|---:|"]
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        change = "" if old is None or new is None else f"{new - old:+.2f}"
        lines.append(markdown.row([markdown.plain(name), _cell(old), _cell(new), change]))
    lines.append("")
    if (folder / CURVES).is_file():
        lines += [markdown.image("Losses over the iterations of each stage", CURVES), ""]
    images = sorted((folder / "predictions").glob("*.png"))
    words = [image for image in images if image.stem.endswith(WORDS)]
    for text, group in (
        ("Ground truth beside what each head predicts:", [p for p in images if p not in words]),
        ("Where the caption head looked at each word:", words),
    ):
        if group:
            lines += [text, "", *(markdown.image(p.stem, f"predictions/{p.name}") for p in group), ""]
    files.write_text(folder / "report.md", "\n".join(lines))
    logger.info("wrote %s", folder / "report.md")


def _cell(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def read_metrics(file: Path) -> dict[str, dict[int, float]]:
    """Scalars of a `metrics.json` (one JSON object a line): name -> iteration -> value.

    A resumed run writes some iterations twice, with the same values. A line that a kill cut short is skipped.
    """
    series: dict[str, dict[int, float]] = {}
    if not file.is_file():
        return series
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items():
            if name != "iteration" and isinstance(value, (int, float)):
                series.setdefault(name, {})[row["iteration"]] = value
    return series


def draw_loss_curves(folder: Path, stages: tuple[str, ...]) -> None:
    """Draw `CURVES`: each stage's total loss and the losses of each head (of the last layer)."""
    from matplotlib.figure import Figure

    found = {stage: read_metrics(folder / stage / "metrics.json") for stage in stages}
    found = {stage: series for stage, series in found.items() if "total_loss" in series}
    if not found:
        return
    figure = Figure(figsize=(6 * len(found), 4), layout="constrained")
    for axes, (stage, series) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for name, values in series.items():
            parts = name.split("/")
            per_head = len(parts) == 2 and parts[1].startswith("loss") and not parts[1][-1].isdigit()
            if name == "total_loss" or per_head:
                iterations = sorted(values)
                # A line through few points is hard to see.
                marker = "o" if len(iterations) < 5 else None
                axes.plot(iterations, [values[i] for i in iterations], label=name, marker=marker)
        axes.set(title=f"stage {stage}", xlabel="iteration", ylabel="loss", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    with files.write_aside(folder / CURVES) as partial:
        figure.savefig(partial, dpi=110, format="png")
