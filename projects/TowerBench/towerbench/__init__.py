"""Benchmarks of CLIP towers on tasks that they were not tuned on, compared in pairs.

A benchmark is one file in `demo/` (rendered images) or `real/` (the user's data). Importing this package is cheap:
torch is imported when a name of the package is first used.
"""

import importlib

_MODULES = {
    "Benchmark": "registry",
    "Context": "registry",
    "FeatureStore": "features",
    "Images": "features",
    "Tower": "towers",
    "register": "registry",
    "registered": "registry",
    "resolve": "registry",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
