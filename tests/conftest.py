"""What every test shares: threads, and a path to the packages for the processes that tests start."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before torch is imported anywhere. Two threads for models this small; more only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Child processes test this checkout, whatever `visft` is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [*map(str, sorted(ROOT.glob("projects/*"))), os.environ.get("PYTHONPATH", "")])
)
# detectron2 reads it at import; tests bring their own data.
os.environ.pop("DETECTRON2_DATASETS", None)

import pytest  # noqa: E402
import torch  # noqa: E402

import visft  # noqa: E402, F401  (its filters, before anything imports detectron2)


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
