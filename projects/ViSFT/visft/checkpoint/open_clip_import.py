"""open_clip, imported when first needed, knowing the demo tower `visft-tiny` and its weights."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def register(open_clip: ModuleType) -> None:
    """Make an imported open_clip know `visft-tiny` and its tag `demo`, the shipped weights. May be called again."""
    from demoworld import tower

    tower.register(open_clip)


class _AfterImport:
    """Finds open_clip as everybody does, and registers `visft-tiny` once its module has run."""

    searching = False

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != "open_clip" or self.searching:
            return None
        self.searching = True  # the other finders are asked now, not this one again
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
    """Let open_clip know `visft-tiny`: now, if it is imported already, else as soon as it is. May be called again."""
    if "open_clip" in sys.modules:
        register(sys.modules["open_clip"])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def open_clip() -> ModuleType:
    """The module open_clip, imported now if need be, knowing `visft-tiny`."""
    module = importlib.import_module("open_clip")
    register(module)
    return module
