"""The model card that goes with every export: base, data, command, check, preprocessing, use and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visft.export.source import Source
from visft.modeling.backbone import lora
from visft.utils import markdown

MARK = "<!-- Written by visft with the weights; a card without this line is never replaced. -->"


@dataclass(frozen=True)
class Facts:
    """What a model card says about the origin of the weights. The card says what is unknown.

    Attributes:
        data: names of the data sets that the tower was tuned on.
        command: the command line of the export.
        figures: metrics as the run measured them, by step ("start", "lora", ...).
        run: the run's folder or the LoRA file.
    """

    data: Sequence[str] = ()
    command: str = ""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    run: str = ""


def text(source: Source, facts: Facts, check: str, *, library: str, content: str, use: str) -> str:
    """Return the card, as Markdown.

    Args:
        check: a phrase that says how the export was checked.
        library: the library that loads the export, by its name on the Hub.
        content: a phrase that says what is in the export.
        use: Python code that loads it.
    """
    base = source.model.base
    weights = "unknown (the model was made of a bare tower)"
    if base is not None:
        weights = (
            markdown.code(base.pretrained) if base.pretrained else "random"
        ) + f", SHA-256 `{base.sha256}`"
    name = source.name or "a tower without a name"
    mixture = {1: "no: the tuned weights", 0: "nothing but the base's weights"}.get(
        source.interpolate,
        f"{source.interpolate:g} x tuned + {1 - source.interpolate:g} x base (WiSE-FT, arXiv:2109.01903)",
    )
    rows = [
        ("Holds", content),
        ("Architecture", f"{markdown.code(name)} of open_clip" if source.name else name),
        ("Base weights", weights),
        ("Tuned by", _tuned_by(source)),
        ("Mixed with the base", mixture),
        ("Tuned on", ", ".join(map(markdown.code, facts.data)) or "not told to the export"),
        ("Of the run or file", markdown.code(facts.run) if facts.run else "not told to the export"),
        (
            "Written by",
            markdown.code(facts.command) if facts.command else "a call of `visft.export`",
        ),
        ("Checked by", check),
    ]
    preprocess = source.preprocess
    resize = {
        "shortest": "the shorter side resized, then the centre cut out",
        "longest": "the longer side resized, then padded around the centre",
        "squash": "both sides resized",
    }[preprocess["resize_mode"]]
    lines = [
        "---",
        f"library_name: {library}",
        "tags:",
        "- clip",
        "- visft",
        "---",
        MARK,
        f"# {markdown.plain(name)}, tuned by ViSFT",
        "",
        "A vision tower of CLIP after supervised fine-tuning on vision tasks (ViSFT, arXiv:2401.10222).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows),
        "",
        "## Pictures",
        f"RGB, {preprocess['size'][0]} x {preprocess['size'][1]} pixels (height x width): {resize}, "
        f"{preprocess['interpolation']}. Values from 0 to 1, less mean {_numbers(preprocess['mean'])}, over deviation "
        f"{_numbers(preprocess['std'])}.",
        "",
        "## Use",
        "```python",
        use.strip(),
        "```",
        "",
        "## Figures",
        *_figures(facts.figures),
        "",
        "The licence is that of the base weights and of the data; ask there.",
    ]
    return "\n".join(lines) + "\n"


def _tuned_by(source: Source) -> str:
    config, model = source.model.lora_config, source.model
    if config is None:
        return "no LoRA: the weights as the model holds them"
    blocks = {site.block for site in lora.sites(model)}
    return (
        f"LoRA of rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets)} of {len(blocks)} of "
        f"{len(model.blocks)} blocks"
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _figures(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table with a column for each step of the run."""
    steps = [step for step, values in figures.items() if values]
    if not steps:
        return ["None were measured with this export."]
    names = list(dict.fromkeys(name for step in steps for name in figures[step]))
    cells = {
        name: [figures[step].get(name) for step in steps]
        for name in names
        if any(isinstance(figures[step].get(name), int | float) for step in steps)
    }
    return [
        "As the run measured them after each of its steps, in per cent; of a mixture with the base none were.",
        "",
        markdown.row(["", *map(markdown.plain, steps)]),
        f"|---|{'---|' * len(steps)}",
        *(
            markdown.row([markdown.plain(name), *("" if v is None else f"{v:.2f}" for v in values)])
            for name, values in cells.items()
        ),
    ]
