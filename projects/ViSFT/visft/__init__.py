"""ViSFT for detectron2. Importing this package registers its backbones, heads, meta-architecture and data sets."""

import importlib.util
import logging
import os
import warnings
from typing import TYPE_CHECKING

# Warnings from old code in detectron2 and its dependencies that no user can act on.
warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
warnings.filterwarnings("ignore", message=r"torch\.meshgrid: in an upcoming release")  # detectron2's anchors
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # detectron2's masks
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: not record.getMessage().startswith("is_fx_tracing will return true")
)

if importlib.util.find_spec("detectron2") is None:
    raise ModuleNotFoundError(
        "visft needs detectron2, which PyPI does not have under that name. Either `pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git` (after torch; needs a compiler), or run `make setup` "
        "in a checkout of visft, which installs a prebuilt one.",
        name="detectron2",
    )

if TYPE_CHECKING:
    from visft.applications.run_model import RunModel

# Imported for their side effect: each adds to detectron2's registries.
from visft import data  # noqa: E402, F401
from visft.config import add_visft_config  # noqa: E402
from visft.model_zoo import paths  # noqa: E402
from visft.modeling import backbone, heads, meta_arch  # noqa: E402, F401

__all__ = ["add_visft_config", "load"]
__version__ = "0.1.0"


def load(
    run: "str | os.PathLike", *, base: "str | os.PathLike | None" = None, device: str | None = None
) -> "RunModel":
    """Load a run as a model with a method `predict(image)`. See `visft.applications.run_model.load`.

    Args:
        run: a run's OUTPUT_DIR, a stage's folder, or a file in one.
        base: the base's weights, if they have moved since training.
        device: `cpu` or `cuda`. The default is the run's own device, if it exists here.
    """
    from visft.applications.run_model import load as load_run

    return load_run(run, base=base, device=device)


data.register_all()
paths.register()
