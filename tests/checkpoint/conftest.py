"""Shared by the tests of weight files."""

import logging

import pytest


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """Let pytest see our log lines, whatever a command-line tool called in this process has set up."""
    logger = logging.getLogger("visft")
    handlers, level = list(logger.handlers), logger.level
    monkeypatch.setattr(logger, "propagate", True)
    yield
    logger.handlers, logger.level = handlers, level
