"""Shared by the tests of weight files."""

import pytest


@pytest.fixture(autouse=True)
def _logged(logged) -> None:
    """Every test here may read the log."""
