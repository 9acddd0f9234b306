"""How arms are run: trained or derived, evaluated, and kept."""

import csv
import functools
import hashlib
import itertools
import json
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm, Plan, changed, image_counts
from detectron2.data import MetadataCatalog

from demoworld.dataset import DemoData
from demoworld.tower import WEIGHTS_FILE
from towerbench import Context, resolve, suite
from visft.applications import export_backbone
from visft.applications.compared_towers import load
from visft.checkpoint import files
from visft.commands import export_backbone as export_command
from visft.data.datasets import demo_world
from visft.engine import launch, settings
from visft.errors import ConfigError, TrainingError

ROOT = Path(__file__).resolve().parents[2]
TOWER, TAG, BASE = "visft-tiny", "demo", "base"
RECORD, TRAINED = "record", "trained.json"
EXPORT = "export/visft_backbone.safetensors"


class Runs:
    """The runs of a plan: their folders, their jobs, and the saved results of finished runs."""

    def __init__(self, plan: Plan, output: Path, results: Path, split: str) -> None:
        self.plan, self.output, self.results, self.split = plan, output, results, split
        self.context = Context(split=split)

    def name(self, arm: Arm | None, seed: int) -> str:
        """Return the name of an arm's run with a seed, with a hash of its settings. None: the untuned tower."""
        if arm is None:
            return f"{BASE}-{seed}-{self.tower_sha256[:10]}"
        identity = [arm.opts, arm.interpolate, arm.iteration, self.tower_sha256]
        if arm.first_scene != 1:  # runs from before this entry existed keep their names
            identity.append(arm.first_scene)
        if arm.classes or arm.names:
            identity.append([arm.classes, arm.names])
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return f"{arm.name.replace(' ', '-')}-{seed}-{digest}"

    def folder(self, arm: Arm | None, seed: int) -> Path:
        """Return the folder of a run. Arms that use another arm's weights have their own folder for the evaluation."""
        return self.output / "runs" / self.name(arm, seed)

    def tasks(self, arm: Arm | None, seed: int) -> list[suite.Task]:
        """Return the benchmarks that can run here. For the untuned tower, only those that depend on the seed."""
        names = arm.suite if arm and arm.suite else self.plan.suite
        classes = [cls for cls in resolve(names) if cls.missing(self.context) is None]
        if arm is None:
            classes = [cls for cls in classes if cls.max_seeds is None or seed < cls.max_seeds]
        return [suite.Task(cls(self.context), [seed], every_seed=True) for cls in classes]

    def job(self, arm: Arm | None, seed: int) -> None:
        """Train and evaluate one run if it is not finished.

        A run with saved scores but without weights is trained again, because other arms need the weights.
        """
        folder = self.folder(arm, seed)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"arm": arm.name if arm else BASE, "seed": seed, "tower": self.tower_sha256}
        if arm is not None:
            record |= self._trained(arm, seed, folder)
        if arm is not None and not arm.of:
            self._keep_log(arm, seed, folder)
        if self.kept(arm, seed) is not None:
            return
        if arm is None:
            tower = load(TOWER, TAG)
        else:
            tower = load(TOWER, str(folder / EXPORT), label=f"{arm.name}, seed {seed}")
        tasks = self.tasks(arm, seed)
        start = time.monotonic()
        (folder / self.split).mkdir(exist_ok=True)
        scores = suite.evaluate(tower, tasks, folder / self.split)
        record["evaluation_seconds"] = round(time.monotonic() - start)
        record["fingerprints"] = {task.benchmark.name: task.fingerprint() for task in tasks}
        file = self._kept_file(arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.write_aside(file) as partial, open(partial, "wb") as stream:
            arrays = {name: rows[0].astype(np.float32) for name, rows in scores.items()}
            np.savez_compressed(stream, **{RECORD: np.array(json.dumps(record))}, **arrays)

    def kept(self, arm: Arm | None, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return scores `[items, k]` by benchmark and the record of a finished run.

        None if the run is not finished, or if benchmarks have changed since.
        """
        file = self._kept_file(arm, seed)
        if not file.is_file():
            return None
        with np.load(file, allow_pickle=False) as content:
            scores = {name: content[name].astype(np.float64) for name in content.files if name != RECORD}
            record = json.loads(str(content[RECORD]))
        if record["fingerprints"] != {
            task.benchmark.name: task.fingerprint() for task in self.tasks(arm, seed)
        }:
            return None
        return scores, record

    def all_kept(self, arm: Arm | None, seeds: int) -> tuple[dict[str, np.ndarray], list[dict]] | None:
        """Return scores `[seeds, items, k]` by benchmark and the records of an arm's finished seeds, up to the first
        unfinished one. None if the first is not finished."""
        every = (self.kept(arm, seed) for seed in range(seeds))
        runs = list(itertools.takewhile(lambda run: run is not None, every))
        if not runs:
            return None
        scores = {name: np.stack([found[name] for found, _ in runs if name in found]) for name in runs[0][0]}
        return scores, [record for _, record in runs]

    def _kept_file(self, arm: Arm | None, seed: int) -> Path:
        return self.results / "scores" / self.split / f"{self.name(arm, seed)}.npz"

    def phases(
        self, arms: Sequence[Arm], *, weights: bool = False
    ) -> tuple[list[tuple[Arm | None, int]], list[tuple[Arm | None, int]]]:
        """Return the unfinished jobs of arms: first the untuned tower and runs that train, then runs that use other
        runs' weights. The first seeds of all arms come before the second ones.

        Args:
            weights: also include runs with saved scores but without weights.
        """
        left = [(arm, seed) for seed in range(self.plan.seeds) for arm in arms if seed < arm.seeds]
        left = [job for job in left if self.kept(*job) is None or (weights and not self.is_trained(*job))]
        derived = [job for job in left if job[0].of]
        own = [job for job in left if not job[0].of]
        for arm, seed in derived:
            source = self.plan.arms[arm.of], seed
            if source not in own and not self.is_trained(*source):
                own.append(source)
        bases = [(None, seed) for seed in range(self.plan.seeds) if self.kept(None, seed) is None]
        return bases + own, derived

    def _trained(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        file = folder / TRAINED
        if not file.is_file():
            start = time.monotonic()
            (self._derive if arm.of else self._train)(arm, seed, folder)
            record = {"opts": arm.opts, "train_seconds": round(time.monotonic() - start)}
            record["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
            record["weights"] = files.sha256(folder / EXPORT)
            files.write_json(file, record)
        return files.read_json(file)

    def is_trained(self, arm: Arm, seed: int) -> bool:
        """Whether the weights of a run exist."""
        return (self.folder(arm, seed) / TRAINED).is_file()

    def scenes(self, arm: Arm) -> Path:
        """Return the demo world that an arm trains on, making it if needed."""
        numbers = self.plan.demo_world
        folder = self.output / f"demo_world_{arm.first_scene}"
        demo_world.make(
            folder, num_train=numbers["train"], num_val=numbers["val"], first_train=arm.first_scene
        )
        return folder

    def _train(self, arm: Arm, seed: int, folder: Path) -> None:
        scenes = self.scenes(arm)
        demo_world.register(scenes)
        os.environ["VISFT_DEMO_DATA"] = str(scenes)
        MetadataCatalog.get(demo_world.NAMES["train"]).class_image_count = image_counts(scenes)
        # Keep every checkpoint, for arms that use an intermediate one.
        words = [*settings.words(arm.opts), "VISFT.SOLVER.LORA.KEEP_CHECKPOINTS", "0"]
        if arm.classes or arm.names:
            data = DemoData(scenes)
            content = changed(files.read_json(data.instances("train")), arm.classes, arm.names, seed)
            files.write_json(folder / "instances.json", content)
            words += ["VISFT.DATA.TRAIN_JSON", str(folder / "instances.json")]
            words += ["VISFT.DATA.TRAIN_IMAGES", str(data.images("train"))]
        words += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
        status = launch.train_config(self.plan.config, words, resume=True)
        if status:
            raise TrainingError(
                f"arm `{arm.name}`, seed {seed}: ended with status {status}; see {folder}/log.txt"
            )

    def _keep_log(self, arm: Arm, seed: int, folder: Path) -> None:
        """Write results/logs/NAME.csv: medians of 20 iterations, with losses summed by head."""
        lines = (folder / "lora" / "metrics.json").read_text(encoding="utf-8").splitlines()
        # Index by iteration, because a resumed training has some rows twice.
        rows = {row["iteration"]: row for row in map(json.loads, lines) if "total_loss" in row}
        file = self.results / "logs" / f"{self.name(arm, seed)}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.write_aside(file) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
            heads = sorted({key.split("/")[0] for row in rows.values() for key in row if "/" in key})
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["iteration", "lr", "grad_norm", "total_loss", *heads])
            for iteration, row in sorted(rows.items()):
                sums = [
                    sum(value for key, value in row.items() if key.startswith(f"{head}/")) for head in heads
                ]
                figures = [row["lr"], row["grad_norm"], row["total_loss"], *sums]
                table.writerow([iteration + 1, *(f"{figure:.5g}" for figure in figures)])

    def _derive(self, arm: Arm, seed: int, folder: Path) -> None:
        """Export weights from another arm's run."""
        source = self.folder(self.plan.arms[arm.of], seed)
        if not self.is_trained(self.plan.arms[arm.of], seed):
            raise ConfigError(
                f"arm `{arm.name}` is of `{arm.of}`, whose run {source} is not finished; run it first"
            )
        weights = source / "lora"
        if arm.iteration is not None:
            weights = weights / f"model_{arm.iteration:07d}.safetensors"
        words = ["--config-file", self.plan.config, "--format", "open_clip"]
        words += ["--weights", str(weights), "--output", str(folder / EXPORT)]
        if arm.interpolate is not None:
            words += ["--interpolate", str(arm.interpolate)]
        (folder / EXPORT).parent.mkdir(exist_ok=True)
        export_backbone.run(export_command.parse([*words, *settings.words(_of_tower(arm.opts))]))

    @functools.cached_property
    def tower_sha256(self) -> str:
        """Hash of the shipped tower. Runs from another tower are different runs."""
        return files.sha256(WEIGHTS_FILE)


def _of_tower(opts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in opts.items() if key.startswith("MODEL.LORA")}
