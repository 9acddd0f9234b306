"""Imports open_clip when it is first needed, with the demo tower `visft-tiny` and its weights registered."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def register(open_clip: ModuleType) -> None:
    """Register `visft-tiny` and its tag `demo`, the shipped weights, in open_clip. May be called again."""
    from demoworld import tower

    tower.register(open_clip)


class _AfterImport:
    """Finds open_clip in the usual way, and registers `visft-tiny` after its import."""

    searching = False

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != "open_clip" or self.searching:
            return None
        self.searching = True  # ask the other finders, not this one again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register `visft-tiny` in open_clip, now if it is imported, otherwise at its import. May be called again."""
    if "open_clip" in sys.modules:
        register(sys.modules["open_clip"])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def open_clip() -> ModuleType:
    """Return the module open_clip with `visft-tiny` registered, importing it if necessary."""
    module = importlib.import_module("open_clip")
    register(module)
    return module
