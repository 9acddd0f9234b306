"""Shared by the tests of weight files."""

import logging
import sys
from pathlib import Path

import pytest

from visft.checkpoint import export_check

sys.path.insert(0, str(Path(__file__).parent))  # small_towers


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """Let pytest see our log lines, whatever a command-line tool called in this process has set up."""
    logger = logging.getLogger("visft")
    handlers, level = list(logger.handlers), logger.level
    monkeypatch.setattr(logger, "propagate", True)
    yield
    logger.handlers, logger.level = handlers, level


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """The module `small_towers`, its towers known to open_clip."""
    import small_towers

    small_towers.register(tmp_path_factory.mktemp("towers"))
    return small_towers


@pytest.fixture
def in_process(monkeypatch):
    """Readers run in this process, where a process of their own is not what is tested: their scripts as they are."""
    import small_towers

    monkeypatch.setattr(export_check, "read", small_towers.read_here)
