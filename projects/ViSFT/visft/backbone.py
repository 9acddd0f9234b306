"""The backbone's earlier place: `visft.backbone` is `visft.modeling.backbone`."""

import sys

from visft.modeling import backbone

sys.modules[__name__] = backbone
sys.modules[f"{__name__}.lora"] = backbone.lora
