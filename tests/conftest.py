"""What every test shares: threads, and a path to the packages for the processes that tests start."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

# Before torch is imported anywhere. Two threads for models this small; more only wait for each other. One thread beside
# another worker of pytest-xdist.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# Child processes test this checkout, whatever `visft` is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [*map(str, sorted(ROOT.glob("projects/*"))), os.environ.get("PYTHONPATH", "")])
)
# detectron2 reads it at import; tests bring their own data.
os.environ.pop("DETECTRON2_DATASETS", None)

import pytest  # noqa: E402
import torch  # noqa: E402

import visft  # noqa: E402, F401  (its filters, before anything imports detectron2)

pytest.register_assert_rewrite("refusals", "runs")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test alone gives the numbers that it gives among others."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The thread count that forked and spawned children set: equal bits need equal counts.

    Batch norm and large sums, among others, round differently when they are split among another number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """What a command-line tool called in this process has set up for its log ends with the test, as its streams do."""
    loggers = [logging.getLogger(name) for name in ("visft", "detectron2")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.level = handlers, level


@pytest.fixture
def logged(monkeypatch) -> None:
    """Let pytest see our log lines, whatever a command-line tool called in this process has set up."""
    monkeypatch.setattr(logging.getLogger("visft"), "propagate", True)


@pytest.fixture(scope="session")
def shapes_train(tmp_path_factory) -> tuple[Path, Path]:
    """Annotation file and images to train on."""
    import shapes

    return shapes.make(tmp_path_factory.mktemp("train"), images=12, seed=0)


@pytest.fixture(scope="session")
def shapes_test(tmp_path_factory) -> tuple[Path, Path]:
    """The same to evaluate on."""
    import shapes

    return shapes.make(tmp_path_factory.mktemp("test"), images=4, seed=1)


@pytest.fixture(scope="session")
def shapes_captions(shapes_train, tmp_path_factory) -> Path:
    """Captions of all images to train on but one, two of them equal."""
    images = json.loads(shapes_train[0].read_text())["images"]
    rows = [
        {"id": i, "image_id": image["id"], "caption": f"picture number {max(i, 2)}"}
        for i, image in enumerate(images[1:], start=1)
    ]
    file = tmp_path_factory.mktemp("captions") / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": rows}))
    return file


@pytest.fixture
def tiny(shapes_train, shapes_test, tmp_path) -> list[str]:
    """Arguments of a run of seconds over configs/visft_demo.yaml, into `tmp_path/run`."""
    from tiny_run import tiny_arguments

    return tiny_arguments(shapes_train, shapes_test, tmp_path / "run")


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> ModuleType:
    """The module `small_towers`, its towers known to open_clip."""
    import small_towers

    small_towers.register(tmp_path_factory.mktemp("towers"))
    return small_towers


@pytest.fixture
def in_process(monkeypatch) -> None:
    """The exports' readers run in this process, where a process of their own is not what is tested."""
    import small_towers

    from visft.export import verification

    monkeypatch.setattr(verification, "read", small_towers.read_here)
