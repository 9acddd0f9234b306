"""The demo's `report.html`: one file for a person to read, on a telephone too, that needs no other."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visft.applications.demo_unseen import Scene
from visft.checkpoint import files
from visft.visualization.run_report import WORDS

NAME = "report.html"

_PREDICTIONS = 4
"""Images of what the heads see; all are in the run's folder."""

_STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 58rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; color: #555; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: normal; }
.words th, .words td { text-align: left; white-space: normal; min-width: 0; }
.better, .right { color: #00568a; font-weight: 600; } .worse, .wrong { color: #a84300; font-weight: 600; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; max-width: 42rem; margin: .25rem 0 1rem; }
.pair span, figcaption { font-size: .9rem; color: #555; }
figure { margin: 0 0 1rem; }
.scale { height: .6rem; max-width: 42rem;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725); }
.ends { display: flex; justify-content: space-between; max-width: 42rem; font-size: .9rem; color: #555; }
summary { cursor: pointer; } .small { font-size: .9rem; color: #555; }
"""

# Nothing but what is in the file may be loaded, whatever is written into it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(
    folder: str | os.PathLike,
    *,
    suite: Mapping[str, str],
    unseen: Mapping[str, str],
    known: Mapping[str, str],
    scenes: Sequence[Scene] = (),
) -> Path:
    """Write `report.html` of a run from its report.json, the suite's results.json and its images.

    Args:
        folder: OUTPUT_DIR.
        suite: benchmarks of the short suite, in order, in words.
        unseen: metrics below `open_vocabulary/` in report.json, in words.
        known: metrics of the heads' own tasks, in words.
        scenes: scenes of unseen things.
    """
    folder = Path(folder)
    results = folder / "out_of_domain" / "results.json"
    text = page(
        files.read_json(folder / "report.json"),
        files.read_json(results) if results.is_file() else None,
        suite=suite,
        unseen=unseen,
        known=known,
        scenes=scenes,
        pictures=_images(folder),
    )
    with files.write_aside(folder / NAME) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / NAME


def page(
    figures: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    *,
    suite: Mapping[str, str],
    unseen: Mapping[str, str],
    known: Mapping[str, str],
    scenes: Sequence[Scene] = (),
    pictures: Sequence[tuple[str, bytes]] = (),
) -> str:
    """The page; see `write`.

    Args:
        figures: what is in report.json.
        results: what is in the suite's results.json.
        images: a caption and a PNG each.
    """
    rows = _suite_rows(results, suite) if results else []
    parts = ["<h1>A CLIP tower, before and after ViSFT</h1>", *_paragraphs(rows, _fallen(figures, known))]
    if scenes:
        parts += [*_scenes(scenes)]
    if rows:
        parts += ["<h2>Things that no training scene showed</h2>", _suite_table(rows)]
        parts.append(_small(f"{results['rule']} Figures are per cent; the change is in percentage points."))
    more = {f"open_vocabulary/{name}": words for name, words in unseen.items()}
    if any(name in figures["before"] for name in more):
        parts += [
            "<h3>Found and named by the heads and the text encoder, under names never trained on</h3>",
            _small("Without intervals."),
            _table(figures, more),
        ]
    parts += [
        "<h2>Known things, on unseen scenes</h2>",
        _small("The tasks of the heads that the tower was tuned through. Without intervals."),
        _table(figures, known),
    ]
    listed = {*known, *more, *(f"out_of_domain/{name}" for name in suite)}
    rest = {name: name for name in figures["before"] | figures["after"] if name not in listed}
    if rest:
        parts.append(f"<details><summary>All other figures</summary>{_table(figures, rest)}</details>")
    if pictures:
        parts.append("<h2>What the run drew</h2>")
        parts += [
            f"<figure>{_image(png, text)}<figcaption>{_(text)}</figcaption></figure>"
            for text, png in pictures
        ]
    parts.append(_small("Scenes are made of OpenMoji's emoji (openmoji.org), CC BY-SA 4.0."))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>A CLIP tower, before and after ViSFT</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- metrics


def _suite_rows(results: Mapping[str, Any], suite: Mapping[str, str]) -> list[dict[str, Any]]:
    """Benchmarks in the order of `suite`, the mean last; each with the verdict on its family."""
    families = {row["name"]: row for row in results["families"]}
    found = {row["name"]: row for row in results["benchmarks"]}
    rows = [
        found[name] | {"words": words, "verdict": families[found[name]["family"]]["verdict"]}
        for name, words in suite.items()
        if name in found
    ]
    return [*rows, *([results["mean"] | {"words": "mean of their families"}] if results["mean"] else [])]


def _fallen(figures: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Metrics that are lower after than before, in words."""
    pairs = {
        words: [figures[side].get(name) for side in ("before", "after")] for name, words in names.items()
    }
    return [
        f"{words.split(',')[0]} ({before:.1f} to {after:.1f})"
        for words, (before, after) in pairs.items()
        if before is not None and after is not None and after < before
    ]


def _paragraphs(rows: Sequence[Mapping[str, Any]], fallen: Sequence[str]) -> list[str]:
    said = [
        "The tower was tuned through task heads, the heads were left behind, and the tower was exported. What "
        "counts is what it knows of things that it was never tuned on."
    ]
    for verdict, start in (
        ("better", "Shown to be better"),
        ("worse", "Shown to be worse"),
        ("not shown", "Not shown either way"),
    ):
        names = [
            f"{row['words'].split(',')[0]} ({row['base']:.1f} to {row['tuned']:.1f})"
            for row in rows
            if row["verdict"] == verdict
        ]
        if rows:
            said.append(f"{start}: {'; '.join(names) or 'nothing'}.")
    if fallen:
        said.append(f"Of known things, lower after than before: {'; '.join(fallen)}.")
    return [f"<p>{_(text)}</p>" for text in said]


def _suite_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        verdict = row["verdict"] or ""
        kind = f' class="{verdict}"' if verdict in ("better", "worse") else ""
        cells.append(
            f"<tr><td>{_(row['words'])}</td><td>{row['base']:.1f}</td><td>{row['tuned']:.1f}</td>"
            f"<td>{row['difference']:+.1f}</td><td{kind}>{_(verdict)}</td>"
            f"<td>{row['low']:+.1f} to {row['high']:+.1f}</td></tr>"
        )
    return _scroll(("", "before", "after", "change", "verdict", "95 % interval"), cells)


def _table(figures: Mapping[str, Any], names: Mapping[str, str]) -> str:
    cells = []
    for name, words in names.items():
        before, after = figures["before"].get(name), figures["after"].get(name)
        if name not in figures["before"] and name not in figures["after"]:
            continue
        change = "" if before is None or after is None else f"{after - before:+.1f}"
        cells.append(
            f"<tr><td>{_(words)}</td><td>{_number(before)}</td><td>{_number(after)}</td><td>{change}</td></tr>"
        )
    return _scroll(("", "before", "after", "change"), cells)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _scroll(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    titles = "".join(f"<th>{_(title)}</th>" for title in head)
    return f'<div class="scroll"><table class="{kind}"><tr>{titles}</tr>{"".join(rows)}</table></div>'


# ---------------------------------------------------------------- scenes


def _scenes(scenes: Sequence[Scene]) -> list[str]:
    parts = [
        "<h2>What it sees in scenes of unseen things</h2>",
        "<p>Each scene three times, before on the left and after on the right. First, every object's mask with the "
        "name that the text encoder gives to the mean of its patches, among all their names: blue where it is right, "
        "vermilion where it is wrong. Then how similar each patch is to one text, in the same colours on both sides. "
        "Last, the patches' features as colours: three principal components, of one basis for both towers and all "
        "scenes. The "
        "scenes are the first of the test part with three different things, not the best.</p>",
    ]
    for place, scene in enumerate(scenes, 1):
        right = [
            sum(name == true for name, true in zip(view.names, scene.truth, strict=True))
            for view in (scene.before, scene.after)
        ]
        count = len(scene.truth)
        parts += [
            f"<h3>Scene {place}: {_(', '.join(dict.fromkeys(scene.truth)))}</h3>",
            f"<p>Named right: {right[0]} of {count} before, {right[1]} of {count} after.</p>",
            _pair(scene, "masks", "named masks"),
            _names(scene),
            f"<p>Similarity to the text “{_(scene.text)}”:</p>",
            _pair(scene, "similarity", f"similarity to the text {scene.text}"),
            f'<div class="scale"></div><div class="ends"><span>{scene.limits[0]:.2f}</span>'
            f"<span>{scene.limits[1]:.2f}</span></div>",
            "<p>Features as colours:</p>",
            _pair(scene, "features", "features as colours"),
        ]
    return parts


def _pair(scene: Scene, kind: str, text: str) -> str:
    cells = [
        f"<div><span>{side}</span>{_image(_png(getattr(view, kind)), f'{text}, {side}')}</div>"
        for side, view in (("before", scene.before), ("after", scene.after))
    ]
    return f'<div class="pair">{"".join(cells)}</div>'


def _names(scene: Scene) -> str:
    rows = []
    for true, *given in zip(scene.truth, scene.before.names, scene.after.names, strict=True):
        cells = "".join(
            f'<td class="{"right" if name == true else "wrong"}">{"✓" if name == true else "✗"} {_(name)}</td>'
            for name in given
        )
        rows.append(f"<tr><td>{_(true)}</td>{cells}</tr>")
    return _scroll(("object", "named before", "named after"), rows, "words")


# ---------------------------------------------------------------- images


def _images(folder: Path) -> list[tuple[str, bytes]]:
    drawn = [path for path in sorted((folder / "predictions").glob("*.png")) if not path.stem.endswith(WORDS)]
    found = [
        ("Differences from the base tower, with 95 % intervals", folder / "out_of_domain" / "forest.png"),
        ("Losses over the iterations of each stage", folder / "loss_curves.png"),
        *(
            ("A scene of known things: ground truth beside what each head finds", path)
            for path in drawn[:_PREDICTIONS]
        ),
    ]
    return [(text, path.read_bytes()) for text, path in found if path.is_file()]


def _png(panel: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{_(text)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _small(text: str) -> str:
    return f'<p class="small">{_(text)}</p>'


def _(text: object) -> str:
    return html.escape(str(text))
