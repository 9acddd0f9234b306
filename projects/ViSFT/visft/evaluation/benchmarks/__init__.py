"""Out-of-domain benchmarks of CLIP towers, compared in pairs. A benchmark is one file in `demo/` or `real/`."""

from .features import FeatureStore, Pictures
from .registry import Benchmark, Context, register, registered, resolve
from .towers import Tower

__all__ = ["Benchmark", "Context", "FeatureStore", "Pictures", "Tower", "register", "registered", "resolve"]
