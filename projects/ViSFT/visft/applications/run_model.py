"""A run in Python: `visft.load(RUN).predict(image)`."""

import os
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from visft.checkpoint.run import generator_state, set_generator_state
from visft.data import build_test_mapper
from visft.data.images import as_rgb
from visft.engine import checks, stages
from visft.engine.from_run import run_config, seed_of
from visft.engine.run_vocabulary import with_vocabulary
from visft.errors import ConfigError
from visft.modeling.heads import Caption
from visft.utils import mixed_precision


class ClassNames(list):
    """A list of names that masks and tensors of numbers can index, as they do the other fields of Instances."""

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, Tensor | np.ndarray | list):
            rows = torch.arange(len(self))[torch.as_tensor(item).cpu()]
            return ClassNames(self[row] for row in rows.reshape(-1).tolist())
        found = super().__getitem__(item)
        return ClassNames(found) if isinstance(item, slice) else found


class Prediction(Instances):
    """A model's prediction for one image: detectron2's Instances on the CPU, in the image's own coordinates.

    Fields: `pred_boxes`, `scores`, `pred_classes`, `pred_class_names` (a list of words), and `pred_masks` where a head
    predicts masks. They come from the last head that predicts masks, else from the first that predicts boxes. A
    selection, such as `found[found.scores > 0.5]`, is a plain Instances with these fields.
    """

    @property
    def caption(self) -> Caption | None:
        """The first caption head's caption (a str, with its words and where the head looked), or None."""
        return self.outputs.get("caption")

    @property
    def outputs(self) -> dict[str, Any]:
        """Each head's prediction by its name: Instances or a Caption."""
        return self._outputs


class RunModel:
    """A trained model.

    Attributes:
        model: the ViSFT model, in evaluation mode.
        cfg: its config.
        class_names: the names of `pred_classes`.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        self.model, self.cfg = model.eval(), cfg
        self.class_names: tuple[str, ...] = model.class_names
        self._mapper = build_test_mapper(cfg)

    @torch.no_grad()
    def predict(
        self, image: str | os.PathLike | Image.Image | np.ndarray, *, channels: str | None = None
    ) -> Prediction:
        """Detect and describe what is in an image, prepared as in the run's evaluation.

        Args:
            image: a file, an image of Pillow's, or an array uint8 [H, W, 3].
            channels: of an array, and of it alone: `RGB` or `BGR`.

        Raises:
            DataError: it is no image, or the channels of an array are not given.
        """
        mapped, _ = self._mapper.resized(as_rgb(image, channels, max_pixels=self.cfg.VISFT.DATA.MAX_PIXELS))
        with mixed_precision.evaluating(self.cfg):
            output = {name: self._named(found) for name, found in self.model([mapped])[0].items()}
        found = output.pop("instances", None)
        size = (mapped["height"], mapped["width"])
        if found is None:
            nothing = torch.zeros(0, dtype=torch.int64)
            fields = {
                "pred_boxes": Boxes(torch.zeros(0, 4)),
                "scores": torch.zeros(0),
                "pred_classes": nothing,
            }
            found = self._named(Instances(size, **fields))
        prediction = Prediction(size, **found.get_fields())
        prediction._outputs = output
        return prediction

    def _named(self, found: Any) -> Any:
        if not isinstance(found, Instances):
            return found
        found = found.to("cpu")
        names = self.class_names
        found.pred_class_names = ClassNames(
            names[number] if number < len(names) else str(number) for number in found.pred_classes.tolist()
        )
        return found


def load(
    run: str | os.PathLike, *, base: str | os.PathLike | None = None, device: str | None = None
) -> RunModel:
    """The model of a run: its newest checkpoints on its base. The random generators' states are kept.

    Args:
        run: a run's OUTPUT_DIR, a stage's folder, or a file of one.
        base: the tower's weights, if they have moved since training.
        device: `cpu` or `cuda`; default: the run's own if available.

    Raises:
        CheckpointError: there is no complete checkpoint, it does not record its config, or its base is missing.
        ConfigError: it has no heads, or the device is not available.
    """
    given = {"MODEL.CLIP_VIT.PRETRAINED": base, "MODEL.DEVICE": device}
    opts = [str(word) for key, value in given.items() if value is not None for word in (key, value)]
    cfg = run_config(os.fspath(run), opts)
    if not cfg.MODEL.VISFT.HEADS:
        raise ConfigError(f"{run}: was trained without heads, so it cannot predict anything")
    checks.check(cfg, train=False, test=False)
    cfg.freeze()
    cfg = with_vocabulary(cfg)
    state = generator_state()
    try:
        model = stages.initial_model(cfg, seed_of(run, cfg.SEED))
    finally:
        set_generator_state(state)
    return RunModel(model, cfg)
