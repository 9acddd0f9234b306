"""Annotated images for the heads' tests."""

import pytest
from annotated_images import annotated


@pytest.fixture
def images() -> list[dict]:
    """Four images of 64 x 64: with three objects, none, one, and five."""
    size = (64, 64)
    return [
        annotated(7, size, [[4, 4, 30, 40], [20, 8, 60, 24], [33, 33, 63, 63]], [0, 1, 2]),
        annotated(8, size, [], []),
        annotated(9, size, [[10, 20, 50, 60]], [2]),
        annotated(
            10,
            size,
            [[0, 0, 8, 64], [8, 0, 64, 8], [20, 20, 30, 30], [40, 16, 64, 48], [9, 50, 40, 64]],
            [4, 3, 2, 1, 0],
        ),
    ]
