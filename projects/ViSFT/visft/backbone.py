"""The old name of the backbone: `visft.backbone` is `visft.modeling.backbone`."""

import sys
from types import ModuleType
from typing import Any

from visft.modeling import backbone


def _shipped(name: str) -> Any:
    if name != "TINY_WEIGHTS":
        raise AttributeError(f"module 'visft.backbone.open_clip_zoo' has no attribute {name!r}")
    from demoworld import tower

    return tower.WEIGHTS_FILE


_zoo = ModuleType("open_clip_zoo")
vars(_zoo).update(vars(backbone.open_clip_models), __getattr__=_shipped)
sys.modules[f"{__name__}.open_clip_zoo"] = _zoo
sys.modules[f"{__name__}.lora"] = backbone.lora
sys.modules[__name__] = backbone
