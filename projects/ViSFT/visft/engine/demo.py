"""`make demo`: the whole method in miniature; and the training of the heads that it starts from."""

import argparse
import json
import logging
import os
from pathlib import Path

import torch

from visft.backbone import open_clip_zoo
from visft.checkpoint import files
from visft.checkpoint.run_folder import newest_checkpoint
from visft.data.demo_world import dataset
from visft.engine import cli, launch, settings
from visft.errors import CheckpointError, TrainingError
from visft.evaluation.benchmarks import Context, report, resolve, suite
from visft.model_zoo import get_config_file

logger = logging.getLogger(__name__)

WEIGHTS = Path(dataset.__file__).with_name("weights")
"""Where the demo's shipped weights are: the tower, and `heads_demo_<head>.safetensors`."""

EXPORTED = Path("export") / "visft_backbone.safetensors"
OUT_OF_DOMAIN = "out_of_domain"
"""Folder of the suite's short form in a run's."""

_SUITE = ("zero-shot emoji", "few-shot digits", "retrieval scenes", "goi zero-shot", "dense text")
"""The benchmarks that need a minute for both towers; the whole suite takes six."""

_FIGURES = {
    "detection/bbox/AP50": "boxes, AP50 on unseen scenes",
    "segmentation/segm/AP50": "masks, AP50 on unseen scenes",
    "captioning/CIDEr": "captions, CIDEr-D on unseen scenes",
    "zero_shot/top1": "zero-shot top-1 on single emoji",
}


def main(argv: list[str] | None = None) -> int:
    """Make the demo world, run configs/visft_demo.yaml, and say what happened; returns the exit status."""
    parser = argparse.ArgumentParser(description="ViSFT in miniature: data, both stages, export, report.")
    parser.add_argument("--num-train", type=int, default=4000, help="training scenes to make")
    parser.add_argument("--num-val", type=int, default=300, help="validation scenes to make")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    args = parser.parse_args(argv)
    return cli.guard(_demo, args, again=cli.RESUME)


def _demo(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _make_data(dataset.default_root(), num_train=args.num_train, num_val=args.num_val)
    folder = _train(get_config_file("visft_demo"), args.opts, resume=args.resume)
    if (folder / EXPORTED).is_file():  # VISFT.EXPORT may say otherwise
        evaluate_out_of_domain(folder)
    print(summary(folder), flush=True)


def evaluate_out_of_domain(folder: str | os.PathLike) -> dict:
    """The short form of tools/evaluate_backbone.py on the exported tower; returns what is in its results.json.

    Args:
        folder: OUTPUT_DIR of a finished run of the demo's tower.
    """
    folder = Path(folder)
    logger.info("out of domain: %s", ", ".join(_SUITE))
    name, tag = open_clip_zoo.TINY, open_clip_zoo.TINY_TAG
    entries = [suite.Entry("base", tag), suite.Entry("tuned", str(folder / EXPORTED))]
    found = suite.run(name, entries, resolve(_SUITE), Context(), seeds=1, output=folder / OUT_OF_DOMAIN)
    report.write(found, folder / OUT_OF_DOMAIN)
    return found


def summary(folder: str | os.PathLike) -> str:
    """The demo's last lines: what happened, the figures that matter, where to look.

    Args:
        folder: OUTPUT_DIR of a finished run.
    """
    folder = Path(folder)
    report = files.read_json(folder / "report.json")
    lines = [
        "",
        "A CLIP tower was tuned through a detector, a mask head and a caption head, the heads were left behind,",
        "and the tower was exported; open_clip loaded it in a process of its own and gave the same embeddings.",
        f"  {'':36}{'before':>8}{'after':>8}",
    ]
    rows, fell = [], []
    for name, words in _FIGURES.items():
        before, after = report["before"].get(name), report["after"].get(name)
        if before is None or after is None:
            continue
        rows.append(f"  {words:36}{before:8.1f}{after:8.1f}   {after - before:+.1f}")
        if after < before:
            fell.append(words.split(",")[0])
    lines += rows
    if fell:
        lines.append(f"What fell: {', '.join(fell)}. It is reported as it is.")
    elsewhere = folder / OUT_OF_DOMAIN / "results.json"
    if elsewhere.is_file():
        lines.append(
            "Of things that no training scene showed (short form; 95 % intervals of the difference):"
        )
        found = files.read_json(elsewhere)
        for row in [*found["families"], found["mean"]]:
            lines.append(
                f"  {row['name']:36}{row['base']:8.1f}{row['tuned']:8.1f}   {row['difference']:+.1f} "
                f"({row['low']:+.1f} to {row['high']:+.1f}), {row['verdict']}"
            )
    lines += [
        f"Report    {folder / 'report.md'}",
        *([f"          {elsewhere.with_name('report.html')}"] if elsewhere.is_file() else []),
        f"Pictures  {folder / 'predictions'}",
        f"Tower     {folder / EXPORTED}",
        f"          open_clip.create_model('local-dir:{folder / EXPORTED.parent}')",
    ]
    return "\n".join(lines)


def train_heads(argv: list[str] | None = None) -> int:
    """Train the demo's stage-1 heads (configs/visft_demo_heads.yaml) and write the files that ship, one a head."""
    parser = argparse.ArgumentParser(description="Train the heads that the demo starts from.")
    parser.add_argument(
        "--heads", nargs="+", default=["detection", "segmentation", "captioning"], help="which ones"
    )
    parser.add_argument("--data", default="datasets/visft_demo_heads", help="folder of the scenes")
    parser.add_argument(
        "--first-train", type=int, default=dataset.FIRST_FRESH, help="number of the first training scene"
    )
    parser.add_argument(
        "--num-train",
        type=int,
        default=dataset.SCENES_OF_HEADS - dataset.FIRST_FRESH + 1,
        help="training scenes to make; with as many as the iterations read, none comes twice",
    )
    parser.add_argument("--num-val", type=int, default=500, help="validation scenes to make")
    parser.add_argument("--run", default="output/demo_heads", help="folder of the run")
    parser.add_argument("--output", default=str(WEIGHTS), help="folder for heads_demo_<head>.safetensors")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    args = parser.parse_args(argv)
    return cli.guard(_train_heads, args, again=cli.RESUME)


def _train_heads(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _make_data(Path(args.data), num_train=args.num_train, num_val=args.num_val, first_train=args.first_train)
    opts = [*args.opts, "MODEL.VISFT.HEADS", str(tuple(args.heads)), "OUTPUT_DIR", args.run]
    folder = _train(get_config_file("visft_demo_heads"), opts, resume=args.resume)
    for head in args.heads:
        ship_heads(folder, Path(args.output) / f"heads_demo_{head}.safetensors", head)


def ship_heads(folder: str | os.PathLike, output: str | os.PathLike, head: str) -> Path:
    """Write one of the newest heads of a run as a float16 file, its own metrics in the metadata.

    Args:
        folder: OUTPUT_DIR of a run whose stage `heads` has a checkpoint.
        output: the safetensors file to write, aside first.
        head: its name in MODEL.VISFT.HEADS.

    Raises:
        CheckpointError: the run has no whole checkpoint of its heads, or none of this one.
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
    dataset.make(root, **numbers)
    dataset.register(root)
    os.environ["VISFT_DEMO_DATA"] = str(root)  # for the processes that are started from here


def _train(config: str, opts: list[str], *, resume: bool) -> Path:
    status = launch.main(["--config-file", config, *(["--resume"] if resume else []), *opts])
    if status:
        raise TrainingError(f"the run of {config} ended with status {status}; its message stands above")
    return Path(settings.load_config(config, opts).OUTPUT_DIR)
