"""What finished runs show: results.json, the reports, and the tables in the documents."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arm_runs import ROOT, TAG, TOWER, Runs

from towerbench import report, statistics, suite
from visft.checkpoint import files
from visft.errors import ConfigError
from visft.utils import markdown

RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENTS = (ROOT / "docs" / "experiments.md", ROOT / "MODEL_ZOO.md")
PLACES = {RESULTS: "experiment", RESULTS / "region_text": "region-text"}
"""Report folders whose table is also in DOCUMENTS, between comments with this name."""
MAIN_ROWS = 5
"""Number of arms, from the start of the plan, in the short table between the comments `<name>-rows`."""


def results(runs: Runs) -> dict[str, Any]:
    """Compare every arm with the untuned tower, and the plan's `pairs` with each other, on their finished seeds.

    The result has the schema of evaluate_backbone's results.json. Seeds are those of the training; the bootstrap
    samples them like items.

    Raises:
        ConfigError: no arm is finished, or the untuned tower was not evaluated.
    """
    finished = {name: runs.all_kept(arm, arm.seeds) for name, arm in runs.plan.arms.items()}
    finished = {name: kept for name, kept in finished.items() if kept is not None}
    base = runs.all_kept(None, runs.plan.seeds)
    if base is None or not finished:
        raise ConfigError(
            f"{runs.results}/scores: no arm is finished, or the untuned tower was not evaluated; run run.py first"
        )
    benchmarks = {task.benchmark.name: task.benchmark for task in runs.tasks(None, 0)}

    def against(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, Any]:
        names = [name for name in benchmarks if name in first and name in second]
        parts = {
            name: statistics.compare(
                name,
                first[name],
                second[name],
                benchmarks[name].figure,
                item_set=benchmarks[name].item_set,
                seed_set="training",
            )
            for name in names
        }
        return suite.compared([benchmarks[name] for name in names], parts)

    def against_base(scores: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = {name: base[0][name][np.arange(len(of)) % len(base[0][name])] for name, of in scores.items()}
        return against(rows, scores)

    def against_each_other(first: str, second: str) -> dict[str, Any]:
        seeds = min(len(finished[name][1]) for name in (first, second))
        cut = [{n: rows[:seeds] for n, rows in finished[name][0].items()} for name in (second, first)]
        return against(*cut)

    tables = {name: against_base(scores) for name, (scores, _) in finished.items()}
    found: dict[str, Any] = {
        "schema": suite.SCHEMA,
        "model": TOWER,
        "towers": [{"label": "base", "weights": TAG, "sha256": runs.tower_sha256}],
        "split": runs.split,
        "seeds": max(len(records) for _, records in finished.values()),
        "rule": statistics.RULE,
        "left_out": {},
    }
    for name, (_, records) in finished.items():
        arm = runs.plan.arms[name]
        found["towers"].append(
            {
                "label": name,
                "weights": arm.label,
                "sha256": records[0]["weights"],
                "seeds": len(records),
                "opts": arm.opts,
                "first_scene": arm.first_scene,
                "train_seconds": float(np.median([record["train_seconds"] for record in records])),
                "evaluation_seconds": float(np.median([record["evaluation_seconds"] for record in records])),
                "peak_gb": max(record["peak_gb"] for record in records),
            }
        )
    for key in ("families", "mean", "benchmarks"):
        several = {name: table[key] for name, table in tables.items()}
        found[key] = several if len(several) > 1 else next(iter(several.values()))
    found["pairs"] = [
        {"first": first, "second": second, **against_each_other(first, second)}
        for first, second in runs.plan.pairs
        if first in finished and second in finished
    ]
    return found


def overview(found: dict[str, Any]) -> str:
    """Return a table with one row per arm: its difference from the untuned tower in every family, their mean with its
    interval, time and memory. A second table compares the arms in `against` with the others."""
    rows, towers = report.comparisons(found), {tower["label"]: tower for tower in found["towers"]}
    names = [row["name"] for row in rows[0][1]["families"]]
    lines = [
        f"| arm | seeds | {' | '.join(names)} | mean | 95 % interval | | training, s | GB |",
        f"|---|{'---:|' * (len(names) + 2)}---|---|---:|---:|",
    ]
    for label, tables in rows:
        tower, mean = towers[label], tables["mean"]
        by_name = {row["name"]: row for row in tables["families"]}
        cells = [
            markdown.plain(label),
            str(tower["seeds"]),
            *(_difference(by_name.get(name)) for name in names),
        ]
        cells.append(
            f"{mean['difference']:+.2f}" + ("" if len(by_name) == len(names) else f" of {len(by_name)}")
        )
        cells += [
            _interval(mean),
            mean["verdict"] or "",
            f"{tower['train_seconds']:.0f}",
            f"{tower['peak_gb']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    base = ", ".join(f"{row['name']} {row['base']:.1f}" for row in rows[0][1]["families"])
    lines += ["", f"The untuned tower: {base}."]
    if found.get("pairs"):
        lines += ["", *_pairs(found["pairs"])]
    return "\n".join(lines) + "\n"


def _pairs(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table with one row per arm: the means of the arms in `against` minus its own."""
    means = {(pair["first"], pair["second"]): pair["mean"] for pair in pairs}
    firsts = dict.fromkeys(pair["first"] for pair in pairs)
    lines = [
        "Means over families, one arm minus another:",
        "",
        f"| | {' | '.join(f'{markdown.plain(first)} minus this arm | 95 % interval | ' for first in firsts)} |",
        f"|---|{'---:|---|---|' * len(firsts)}",
    ]
    for second in dict.fromkeys(pair["second"] for pair in pairs):
        cells = [markdown.plain(second)]
        for first in firsts:
            mean = means.get((first, second))
            cells += (
                [f"{mean['difference']:+.2f}", _interval(mean), mean["verdict"] or ""] if mean else [""] * 3
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    mark = {"better": "**", "worse": "_"}.get(row["verdict"], "")
    return f"{mark}{row['difference']:+.2f}{mark}"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:+.2f} to {row['high']:+.2f}"


def write(found: dict[str, Any], folder: Path) -> None:
    """Write results.json, report.md, report.html, forest.png, overview.md, and for PLACES the tables in DOCUMENTS."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(found, folder)
    with files.write_aside(folder / "overview.md") as partial:
        partial.write_text(overview(found), encoding="utf-8")
    place = PLACES.get(folder.resolve())
    if place:
        for document in DOCUMENTS:
            text = filled(document.read_text(encoding="utf-8"), found, place)
            with files.write_aside(document) as partial:
                partial.write_text(text, encoding="utf-8")


def filled(document: str, found: dict[str, Any], place: str) -> str:
    """Return a document with a new overview between the comments `<!-- place -->` and `<!-- /place -->`.

    Between `<!-- place-rows -->` and its end are only the rows of the first arms.
    """
    whole = overview(found)
    rows = "".join(whole.splitlines(keepends=True)[: 2 + MAIN_ROWS])
    for name, text in ((place, whole), (f"{place}-rows", rows)):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        document = pattern.sub(lambda at, text=text: f"{at[1]}{text}{at[2]}", document)
    return document
