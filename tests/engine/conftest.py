"""What the tests of the engine share: two small data sets, and the arguments of a tiny run."""

from pathlib import Path

import pytest
import shapes
from tiny_run import tiny_arguments


@pytest.fixture(scope="session")
def shapes_train(tmp_path_factory) -> tuple[Path, Path]:
    """Annotation file and pictures to train on."""
    return shapes.make(tmp_path_factory.mktemp("train"), images=12, seed=0)


@pytest.fixture(scope="session")
def shapes_test(tmp_path_factory) -> tuple[Path, Path]:
    """The same to evaluate on."""
    return shapes.make(tmp_path_factory.mktemp("test"), images=4, seed=1)


@pytest.fixture
def tiny(shapes_train, shapes_test, tmp_path) -> list[str]:
    """Arguments of a run of seconds over configs/visft_demo.yaml, into `tmp_path/run`."""
    return tiny_arguments(shapes_train, shapes_test, tmp_path / "run")
