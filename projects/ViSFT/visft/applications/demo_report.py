"""The demo's `report.html`: a page in a single file, readable on a phone."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from visft.applications.demo_unseen import Scene
from visft.checkpoint import files
from visft.visualization.run_report import WORDS

NAME = "report.html"

_PREDICTIONS = 4
"""Images of predictions on the page; the run's folder has all."""

# The browser may load nothing from outside the file.
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
        images=_images(folder),
    )
    files.write_text(folder / NAME, text)
    return folder / NAME


def page(
    figures: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    *,
    suite: Mapping[str, str],
    unseen: Mapping[str, str],
    known: Mapping[str, str],
    scenes: Sequence[Scene] = (),
    images: Sequence[tuple[str, bytes]] = (),
) -> str:
    """The page, from the template `demo_report.html`; see `write`.

    Args:
        figures: the content of report.json.
        results: the content of the suite's results.json.
        images: a caption and a PNG each.
    """
    before, after = figures["before"], figures["after"]
    unseen = {f"open_vocabulary/{name}": words for name, words in unseen.items()}
    listed = {*known, *unseen, *(f"out_of_domain/{name}" for name in suite)}
    values = {
        "before": {name: before.get(name) for name in {**before, **after}},
        "after": {name: after.get(name) for name in {**before, **after}},
        "rows": _suite_rows(results, suite) if results else [],
        "rule": results["rule"] if results else "",
        "unseen": {name: words for name, words in unseen.items() if name in before},
        "known": known,
        "rest": {name: name for name in {**before, **after} if name not in listed},
    }
    fallen = [name for name in known if _fell(before.get(name), after.get(name))]
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["base64"] = _base64
    template = environment.get_template("demo_report.html")
    return template.render(**values, fallen=fallen, scenes=scenes, images=images, policy=_POLICY)


def _suite_rows(results: Mapping[str, Any], suite: Mapping[str, str]) -> list[dict[str, Any]]:
    """Benchmarks in the order of `suite`, each with the verdict on its family, and the mean."""
    families = {row["name"]: row for row in results["families"]}
    found = {row["name"]: row for row in results["benchmarks"]}
    rows = [
        found[name] | {"words": words, "verdict": families[found[name]["family"]]["verdict"]}
        for name, words in suite.items()
        if name in found
    ]
    return [*rows, *([results["mean"] | {"words": "mean of their families"}] if results["mean"] else [])]


def _fell(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before


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


def _base64(image: bytes | np.ndarray) -> str:
    """A PNG, or the PNG of a panel `[H, W, 3]` uint8."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        image = buffer.getvalue()
    return base64.b64encode(image).decode("ascii")
