"""Shared by the tests of weight files."""

import contextlib
import io
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from visft.checkpoint import export_check
from visft.errors import ExportError

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

    def read(reader, *arguments):
        script = (export_check.READERS / f"{reader}.py").read_text()
        monkeypatch.setattr(sys, "argv", ["-c", *map(str, arguments)])
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), torch.autocast("cpu", enabled=False):
                exec(compile(script, reader, "exec"), {"__name__": "__main__"})
        except (Exception, SystemExit) as error:
            raise ExportError(f"{reader} does not load the export: {error}") from error
        return json.loads(output.getvalue().strip().splitlines()[-1])

    monkeypatch.setattr(export_check, "read", read)
