"""What `tools/benchmark.py --against reference` measures, and its figures as tables and as a plot."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from visft.applications import speed
from visft.checkpoint import files
from visft.utils import markdown

OURS, REFERENCE, STAGE_1 = "ours", "reference", "ours, stage heads"
STEP, CHECKPOINTED, CACHED = "LoRA step", "LoRA step, checkpointed", "stage-1 iteration, cached features"
FORWARD, ALL, RATIO, HEADS = (
    "tower forward",
    "iteration of all tasks",
    "an iteration per task",
    "stage-1 iteration",
)
LOADER, INFERENCE, EXPORT = "loader", "inference", "export with its check"


def parts(heads: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """What is measured, and the ways that do it.

    `iteration of all tasks` is one joint iteration of ours, and of the reference an iteration for each task.
    """
    both = [FORWARD, STEP, CHECKPOINTED, *(f"head {name}" for name in heads), ALL]
    return (
        {part: (OURS, REFERENCE) for part in both}
        | {RATIO: (OURS,)}
        | {part: (STAGE_1,) for part in (HEADS, CACHED)}
        | {part: (OURS,) for part in (LOADER, INFERENCE, EXPORT)}
    )


def summary(rounds: list[dict[str, dict[str, dict]]]) -> dict:
    """Medians, with the least and the most.

    Args:
        rounds: of each part and way what `Way.measure` found; the first for memory, the others for times.

    Returns:
        `parts`: by part and way `seconds`, `memory`, and `images` that passed. `ratios`: by what they say, of each
        round's quotient. `loss_difference`: the largest between the ways, relative to the loss.
    """

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    first, *rounds = rounds
    figures = {
        part: {
            name: {
                "seconds": spread([row[part][name]["seconds"] for row in rounds]),
                "memory": of_memory["memory"],
                "images": of_memory["images"],
            }
            for name, of_memory in ways.items()
        }
        for part, ways in first.items()
    }

    def seconds(row: dict, part: str, name: str) -> float:
        return row[part][name]["seconds"]

    tasks = len([part for part in figures if part.startswith("head ")])
    quotients = {
        f"one joint iteration is faster than {tasks} of the reference": ((ALL, REFERENCE), (ALL, OURS)),
        f"one joint iteration is faster than {tasks} of our own": ((RATIO, OURS), (ALL, OURS)),
        "LoRA step is faster than the reference's, which is checkpointed": (
            (CHECKPOINTED, REFERENCE),
            (STEP, OURS),
        ),
        "LoRA step, checkpointed, is faster than the reference's": (
            (CHECKPOINTED, REFERENCE),
            (CHECKPOINTED, OURS),
        ),
        "LoRA step is faster than the reference's without checkpointing": ((STEP, REFERENCE), (STEP, OURS)),
        "LoRA step takes as many forward passes": ((STEP, OURS), (FORWARD, OURS)),
        "LoRA step, checkpointed, takes as many forward passes": ((CHECKPOINTED, OURS), (FORWARD, OURS)),
        "stage-1 iteration is faster with cached features": ((HEADS, STAGE_1), (CACHED, STAGE_1)),
    }
    ratios = {
        name: spread([seconds(row, *a) / seconds(row, *b) for row in rounds])
        for name, (a, b) in quotients.items()
    }
    ours, theirs = (first[ALL][name]["losses"] for name in (OURS, REFERENCE))
    difference = max(
        abs(ours[name] - theirs[name]) / max(abs(ours[name]), 1e-6) for name in ours.keys() | theirs.keys()
    )
    return {"parts": figures, "ratios": ratios, "loss_difference": difference}


def report(found: dict) -> str:
    """The figures of `summary` as Markdown."""
    clock = "processor time" if found["clock"] == "processor_time" else "wall time"
    lines = [
        f"{speed.heading(found, 'lora')}; {clock}",
        "",
        "| | ours | the reference | faster |",
        "|---|---|---|---:|",
    ]
    for part, ways in found["parts"].items():
        cells = [_cell(ways[name]) if name in ways else "" for name in (OURS, REFERENCE)]
        if STAGE_1 in ways:
            cells[0] = _cell(ways[STAGE_1])
        faster = ""
        if REFERENCE in ways:
            faster = f"{ways[REFERENCE]['seconds']['median'] / ways[OURS]['seconds']['median']:.2f} x"
        lines.append(markdown.row([_title(part, ways), *cells, faster]))
    lines += ["", "| medians of the rounds' quotients (least to most) | |", "|---|---:|"]
    for name, ratio in found["ratios"].items():
        lines.append(
            markdown.row([name, f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"])
        )
    note = f"The losses of both ways differ by {found['loss_difference']:.1e} of their value at most."
    return "\n".join([*lines, "", note])


def _title(part: str, ways: dict) -> str:
    [figures, *_] = ways.values()
    per_second = figures["images"] / figures["seconds"]["median"]
    return f"{part} ({per_second:.3g} images/s)" if part in (LOADER, INFERENCE) else part


def _cell(figures: dict) -> str:
    seconds = figures["seconds"]
    return (
        f"{seconds['median']:.3g} s ({seconds['least']:.3g} to {seconds['most']:.3g}), "
        f"{figures['memory']:.2f} GiB"
    )


def plot(found: dict, path: Path) -> None:
    """Bars of seconds by part and way, with lines from the least to the most; the suffix is the format."""
    shown = [part for part in found["parts"] if part not in (LOADER, EXPORT)]
    image = Figure(figsize=(8, 0.45 * len(shown) + 1.2), layout="constrained")
    axes = image.subplots()
    for row, part in enumerate(shown):
        ways = found["parts"][part]
        for (name, figures), place in zip(
            ways.items(), (-0.19, 0.19) if len(ways) > 1 else (0,), strict=True
        ):
            seconds = figures["seconds"]
            colour = "tab:orange" if name == REFERENCE else "tab:blue"
            axes.barh(row + place, seconds["median"], height=0.36, color=colour)
            axes.plot([seconds["least"], seconds["most"]], [row + place] * 2, color="black", linewidth=1)
            axes.text(seconds["most"], row + place, f" {seconds['median']:.3g}", va="center", fontsize=7)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds (blue: ours, orange: the reference recipe)")
    axes.set_title(f"{found['tower']}, {len(found['images'])} images, medians of {found['rounds']} rounds")
    with files.write_aside(path) as partial:
        image.savefig(partial, dpi=120, format=path.suffix[1:])
