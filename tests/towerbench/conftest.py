"""The demo tower and its features, computed once a test file; and benchmarks run on them, alone and by the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demoworld import tower as demo_tower
from towerbench import Context, FeatureStore, Tower, registered, suite
from towerbench import __main__ as evaluate


@pytest.fixture(scope="module")
def store():
    made = FeatureStore(Tower.load(demo_tower.NAME, "demo", device="cpu"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nothing, unless a file has some."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def of(data) -> Callable[..., Any]:
    """A benchmark of the real suite by its name, on the file's data or others."""
    return lambda name, where=data, **more: registered()[name](Context(data=where, **more))


@pytest.fixture
def run(store, of) -> Callable[..., Any]:
    """A benchmark and the scores of its items."""

    def run(name: str, seed: int = 0, store: FeatureStore = store) -> tuple[Any, np.ndarray]:
        benchmark = of(name)
        return benchmark, np.asarray(benchmark.items(store, benchmark.images(seed), seed))

    return run


@pytest.fixture
def command(tmp_path) -> Callable[..., tuple[dict, dict]]:
    """The command, which compares the demo tower with itself, on data; results.json, and its benchmarks by name."""

    def command(data: Path, names: str, seeds: int = 2) -> tuple[dict, dict]:
        words = [
            "--model",
            demo_tower.NAME,
            "--pretrained",
            "demo",
            "--compare",
            str(demo_tower.WEIGHTS_FILE),
        ]
        words += ["--data", str(data), "--seeds", str(seeds), "--suite", names]
        assert evaluate.main([*words, "--output", str(tmp_path / "evaluation")]) == 0
        results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
        for row in results["benchmarks"]:
            assert row["difference"] == row["low"] == row["high"] == 0
        return results, {row["name"]: row for row in results["benchmarks"]}

    return command


@pytest.fixture
def against_itself(tmp_path) -> Callable[..., dict]:
    """The demo suite's benchmarks of the demo tower and of its weights' file, which have the same figures."""

    def against_itself(*benchmarks: type, seeds: int = 1) -> dict:
        entries = [suite.Entry("base", "demo"), suite.Entry("same", str(demo_tower.WEIGHTS_FILE))]
        results = suite.run(demo_tower.NAME, entries, benchmarks, Context(), seeds=seeds, output=tmp_path)
        for row in results["families"]:
            assert row["difference"] == row["low"] == row["high"] == 0 and row["verdict"] == "not shown"
        return results

    return against_itself
