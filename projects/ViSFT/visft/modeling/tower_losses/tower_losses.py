"""All objectives of a run: which images each learns from, and one loss of each, alike over processes."""

from collections.abc import ItemsView, Mapping

import torch
from detectron2.utils import comm
from torch import Tensor

from visft.modeling.backbone.untuned_tower import OriginalTower
from visft.modeling.tower_losses.base import Objective
from visft.modeling.tower_losses.batch import Batch
from visft.utils import shared_random


class ObjectiveGroup:
    """Objectives by name, in the order of MODEL.VISFT.OBJECTIVES. No module.

    Args:
        objectives: by name.
        original: the tower before tuning, if one of them needs it.
    """

    def __init__(self, objectives: Mapping[str, Objective], original: OriginalTower | None = None) -> None:
        self._objectives, self._original = dict(objectives), original

    def __len__(self) -> int:
        return len(self._objectives)

    def items(self) -> ItemsView[str, Objective]:
        """Names and objectives."""
        return self._objectives.items()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`NAME/loss`, weighted, of each objective that some process has images for.

        The mean of a loss over processes is that of one process with all their images, as is the mean of the
        gradients. Every process calls this, and then runs its backward pass.
        """
        batch.original = self._original
        rows = {
            name: [i for i, image in enumerate(batch.images) if objective.has_labels(image)]
            for name, objective in self.items()
        }
        counts = [float(part.count(batch, rows[name])) for name, part in self.items()]
        means = torch.tensor(counts, dtype=torch.float64)
        if comm.get_world_size() > 1:
            means = means.to(batch.device)
            torch.distributed.all_reduce(means)
            means /= comm.get_world_size()
        losses: dict[str, Tensor] = {}
        for (name, objective), mean in zip(self.items(), means.tolist(), strict=True):
            if mean == 0:
                continue
            if rows[name] or objective.collective:
                normalizer = torch.tensor(mean, dtype=torch.float32, device=batch.device)
                losses[f"{name}/loss"] = objective.weight * objective.loss(batch, rows[name], normalizer)
            else:
                losses[f"{name}/loss"] = torch.zeros((), device=batch.device, requires_grad=True)
        return losses


def draw_number() -> int:
    """A shared number, after which the generator is as it was: heads draw what they would without objectives."""
    generator = shared_random.generator()
    state = generator.get_state()
    number = shared_random.number()
    generator.set_state(state)
    return number
