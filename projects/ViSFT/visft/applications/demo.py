"""`make demo`: the whole method in miniature, and the training of the heads that it starts from."""

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from demoworld import dataset, tower
from towerbench import Context, report, resolve, suite
from visft import model_zoo
from visft.applications import demo_report, demo_unseen
from visft.applications.compared_towers import load
from visft.checkpoint import files
from visft.checkpoint.run_folder import newest_checkpoint
from visft.data.datasets import demo_world
from visft.engine import checks, evaluate, launch, settings, stages
from visft.errors import CheckpointError, TrainingError
from visft.model_zoo import get_config_file

logger = logging.getLogger(__name__)

WEIGHTS = Path(model_zoo.__file__).with_name("weights")
"""Folder of the shipped heads: `heads_demo_<head>.safetensors`."""

EXPORTED = Path("export") / "visft_backbone.safetensors"
OUT_OF_DOMAIN = "out_of_domain"
"""Folder of the short suite, in OUTPUT_DIR."""

UNSEEN = "unseen"
"""Folder of images of scenes of unseen things, in OUTPUT_DIR."""

_SUITE = {
    "goi zero-shot": "regions named by the text encoder, top-1 and top-5",
    "dense text": "patches named by the text encoder, mIoU",
    "zero-shot emoji": "zero-shot of single emoji, top-1",
    "retrieval scenes": "retrieval of scenes and captions, recall",
    "few-shot digits": "digits by a linear probe, accuracy",
    "robustness emoji": "zero-shot under corruption, top-1",
}
"""Benchmarks of the short suite in the order of the last lines. The whole suite takes several times as long."""

_UNSEEN = {
    "segmentation/segm/AP50": "masks found and named, AP50",
    "detection/bbox/AP50": "boxes found and named, AP50",
}
"""Metrics of heads and text encoder together, with names never trained on (`MODEL.VISFT.OPEN_VOCABULARY`)."""

_FIGURES = {
    "detection/bbox/AP50": "boxes, AP50",
    "segmentation/segm/AP50": "masks, AP50",
    "captioning/CIDEr": "captions, CIDEr-D",
    "region_text/mask/top1": "regions named by the text encoder, top-1",
}


def run(args: argparse.Namespace) -> None:
    """Make the demo world, run configs/visft_demo.yaml, evaluate on things never tuned on, and report."""
    numbers = {"num_train": args.num_train, "num_val": args.num_val, "num_unseen": args.num_unseen}
    _make_data(demo_world.default_root(), **numbers)
    folder = _train(get_config_file("visft_demo"), args.opts, resume=args.resume)
    if (folder / EXPORTED).is_file():  # unless VISFT.EXPORT leaves it out
        complete_report(folder, evaluate_out_of_domain(folder), evaluate_unseen(folder))
    write_page(folder)
    print(summary(folder), flush=True)


def evaluate_out_of_domain(folder: str | os.PathLike) -> dict:
    """Run the short suite on the exported tower; returns the content of its results.json.

    Args:
        folder: OUTPUT_DIR of a finished run of the demo's tower.
    """
    folder = Path(folder)
    logger.info("out of domain: %s", ", ".join(_SUITE))
    name, tag = tower.NAME, tower.TAG
    entries = [suite.Entry("base", tag), suite.Entry("tuned", str(folder / EXPORTED))]
    benchmarks = resolve(tuple(_SUITE))
    found = suite.run(name, entries, benchmarks, Context(), seeds=1, output=folder / OUT_OF_DOMAIN, load=load)
    report.write(found, folder / OUT_OF_DOMAIN)
    return found


def evaluate_unseen(folder: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Average precision of masks and boxes of things never trained on, under names never trained on.

    The shipped heads propose and the text encoder names (see `visft.modeling.open_vocabulary`). Only the towers differ.

    Args:
        folder: OUTPUT_DIR of a finished run of the demo's tower.

    Returns:
        `{"before": {"segmentation/segm/AP50": ..., ...}, "after": {...}}`, per cent.
    """
    heads = ("detection", "segmentation")
    keys = {
        "MODEL.VISFT.HEADS": heads,
        "MODEL.VISFT.HEAD_FILES": tuple(f"visft://heads_demo_{head}.safetensors" for head in heads),
        "MODEL.VISFT.OBJECTIVES": (),
        "MODEL.VISFT.OPEN_VOCABULARY.NAMES": ("test",),
        "DATASETS.TEST": (demo_world.NAMES["unseen"],),
        "OUTPUT_DIR": str(folder),
    }
    found = {}
    for step, weights in (("before", tower.TAG), ("after", str(Path(folder) / EXPORTED))):
        words = settings.words({**keys, "MODEL.CLIP_VIT.PRETRAINED": weights})
        cfg = settings.load_config(get_config_file("visft_demo"), words)
        checks.check(cfg, train=False)
        figures = evaluate.evaluate(cfg, stages.initial_model(cfg, 0).eval())
        found[step] = {name: value for name, value in figures.items() if name in _UNSEEN}
    return found


def complete_report(
    folder: str | os.PathLike, suite_results: dict, unseen: dict[str, dict[str, float]]
) -> None:
    """Add figures on things never tuned on to a run's report.json.

    `before` and `after` get `out_of_domain/BENCHMARK` and `open_vocabulary/METRIC`. `out_of_domain` gets the suite's
    rows with intervals.
    """
    file = Path(folder) / "report.json"
    content = files.read_json(file)
    rows = {row["name"]: row for row in suite_results["benchmarks"]}
    for step, side in (("before", "base"), ("after", "tuned")):
        for name, row in rows.items():
            content[step][f"out_of_domain/{name}"] = row[side]
        for name, value in unseen[step].items():
            content[step][f"open_vocabulary/{name}"] = value
    content["out_of_domain"] = [*rows.values(), suite_results["mean"]]
    files.write_json(file, content)


def write_page(folder: str | os.PathLike) -> Path:
    """Write a run's `report.html` and, if a tower was exported, its images of unseen things in `unseen/`.

    Args:
        folder: OUTPUT_DIR of a finished run of the demo's tower.
    """
    folder, scenes = Path(folder), []
    if (folder / EXPORTED).is_file():
        towers = [load(tower.NAME, weights) for weights in (tower.TAG, str(folder / EXPORTED))]
        scenes = demo_unseen.draw(towers, folder / UNSEEN)
    return demo_report.write(folder, suite=_SUITE, unseen=_UNSEEN, known=_FIGURES, scenes=scenes)


def summary(folder: str | os.PathLike) -> str:
    """The demo's last lines: what was done, the main metrics, and where to look.

    Args:
        folder: OUTPUT_DIR of a finished run.
    """
    folder = Path(folder)
    found = files.read_json(folder / "report.json")
    before, after = found["before"], found["after"]
    suite_rows = {row["name"]: row for row in found.get("out_of_domain", [])}
    unseen = [
        (words, row["base"], row["tuned"], f" ({row['low']:+.1f} to {row['high']:+.1f})")
        for name, words in {**_SUITE, "mean": "mean of their families"}.items()
        if (row := suite_rows.get(name))
    ]
    unseen += _figures(before, after, {f"open_vocabulary/{name}": words for name, words in _UNSEEN.items()})
    known = _figures(before, after, _FIGURES)
    lines = [
        "",
        "A CLIP tower was tuned through a detector, a mask head, a caption head and its own text encoder. The heads",
        "were left behind, and the tower was exported; open_clip loaded it in a process of its own.",
        *(_table("Things that no training scene showed", "change (95 %)", unseen) if unseen else []),
        *_table("Known things, on unseen scenes", "change", known),
    ]
    fell = [words.split(",")[0] for words, old, new, _ in (*unseen, *known) if new < old]
    if fell:
        lines += ["", f"What fell: {', '.join(fell)}."]
    lines += [
        "",
        f"Report    {folder / demo_report.NAME}",
        f"          {folder / 'report.md'}",
        f"Images    {folder / 'predictions'}",
        *([f"          {folder / UNSEEN}"] if (folder / UNSEEN).is_dir() else []),
        f"Tower     {folder / EXPORTED}",
        f"          open_clip.create_model('local-dir:{folder / EXPORTED.parent}')",
    ]
    return "\n".join(lines)


def _figures(
    before: Mapping[str, float | None], after: Mapping[str, float | None], names: Mapping[str, str]
) -> list[tuple[str, float, float, str]]:
    """Words, both values and an empty interval of each metric that both have."""
    pairs = [(words, before.get(name), after.get(name), "") for name, words in names.items()]
    return [pair for pair in pairs if None not in pair]


def _table(title: str, change: str, rows: Sequence[tuple[str, float, float, str]]) -> list[str]:
    lines = ["", f"  {title:54}{'before':>7}{'after':>7}  {change}"]
    return lines + [
        f"  {words:54}{old:7.1f}{new:7.1f}  {new - old:+6.1f}{more}" for words, old, new, more in rows
    ]


def train_heads(args: argparse.Namespace) -> None:
    """Train the demo's stage-1 heads (configs/visft_demo_heads.yaml) and write the files that ship, one a head.

    By default the scenes are new to all earlier heads, and as many as the iterations read, so none comes twice.
    """
    first = dataset.FIRST_FRESH if args.first_train is None else args.first_train
    count = dataset.SCENES_OF_HEADS - dataset.FIRST_FRESH + 1 if args.num_train is None else args.num_train
    _make_data(Path(args.data), num_train=count, num_val=args.num_val, first_train=first)
    opts = [*args.opts, "MODEL.VISFT.HEADS", str(tuple(args.heads)), "OUTPUT_DIR", args.run]
    folder = _train(get_config_file("visft_demo_heads"), opts, resume=args.resume)
    for head in args.heads:
        ship_heads(folder, Path(args.output or WEIGHTS) / f"heads_demo_{head}.safetensors", head)


def ship_heads(folder: str | os.PathLike, output: str | os.PathLike, head: str) -> Path:
    """Write one head of a run's newest checkpoint as a float16 file with its metrics in the metadata.

    Args:
        folder: OUTPUT_DIR of a run whose stage `heads` has a checkpoint.
        output: the safetensors file to write.
        head: its name in MODEL.VISFT.HEADS.

    Raises:
        CheckpointError: the run has no whole checkpoint of its heads, or none of this head.
    """
    checkpoint = newest_checkpoint(Path(folder) / "heads")
    if checkpoint is None:
        raise CheckpointError(f"{folder}/heads has no whole checkpoint; train stage heads there first")
    tensors = {
        name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        for name, tensor in files.read_tensors(checkpoint).items()
        if name.startswith(f"heads.{head}.")
    }
    if not tensors:
        raise CheckpointError(f"{checkpoint} has no head `{head}`; name one that the run trained")
    metadata = files.read_metadata(checkpoint)
    about = json.loads(metadata["visft"])
    if head != "captioning":
        about["settings"].pop("vocabulary", None)  # another head's
    metadata["visft"] = json.dumps(about)
    report = Path(folder) / "report.json"
    if report.is_file():
        after = files.read_json(report)["after"]
        own = {name: value for name, value in after.items() if name.split("/")[0] in (head, "zero_shot")}
        metadata["figures"] = json.dumps(own)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(output, tensors, metadata)
    size, digest = output.stat().st_size, files.sha256(output)
    logger.info("%s: %d tensors, %d bytes, SHA-256 %s", output, len(tensors), size, digest)
    return output


def _make_data(root: Path, **numbers: int) -> None:
    logger.info("the demo world: %d + %d scenes in %s", numbers["num_train"], numbers["num_val"], root)
    demo_world.make(root, **numbers)
    demo_world.register(root)
    os.environ["VISFT_DEMO_DATA"] = str(root)  # for the processes that are started from here


def _train(config: str, opts: list[str], *, resume: bool) -> Path:
    status = launch.train_config(config, opts, resume=resume)
    if status:
        raise TrainingError(f"the run of {config} ended with status {status}; its message stands above")
    return Path(settings.load_config(config, opts).OUTPUT_DIR)
