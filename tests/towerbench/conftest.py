"""The demo tower and its features, computed once a test file."""

import pytest

from demoworld import tower as demo_tower
from towerbench import FeatureStore, Tower


@pytest.fixture(scope="module")
def store():
    made = FeatureStore(Tower.load(demo_tower.NAME, "demo", device="cpu"))
    yield made
    made.close()
