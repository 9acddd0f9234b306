"""Objectives by name: the registry, building those of a config, and their losses in one forward pass."""

from collections.abc import ItemsView, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor

from visft.errors import check_one_of
from visft.modeling.backbone import CLIPViT
from visft.modeling.distributed import means_over_processes
from visft.modeling.tower_losses.base import Objective
from visft.modeling.tower_losses.batch import Batch, OriginalTower

VISFT_OBJECTIVES_REGISTRY = Registry("VISFT_OBJECTIVES")
VISFT_OBJECTIVES_REGISTRY.__doc__ = """
Objectives of the tower itself. An entry is a subclass of `Objective`, called as `objective(cfg, name, backbone)`:
`name` is that in MODEL.VISFT.OBJECTIVES; its node MODEL.VISFT.<NAME> holds OBJECTIVE (the entry), WEIGHT and its keys.
"""


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
        counts = {
            name: torch.tensor([float(part.count(batch, rows[name]))], dtype=torch.float64)
            for name, part in self.items()
        }
        means = means_over_processes(counts, batch.device)
        losses: dict[str, Tensor] = {}
        for name, objective in self.items():
            mean = float(means[name][0])
            if mean == 0:
                continue
            if rows[name] or objective.collective or batch.sharded:
                normalizer = torch.tensor(mean, dtype=torch.float32, device=batch.device)
                # The other processes need this one's pieces of the tower, for as many passes as they run.
                stand_in = not (rows[name] or objective.collective)
                loss = objective.loss(batch, [0] if stand_in else rows[name], normalizer)
                losses[f"{name}/loss"] = objective.weight * loss * (0 if stand_in else 1)
            else:
                losses[f"{name}/loss"] = torch.zeros((), device=batch.device, requires_grad=True)
        return losses


def objective_names(cfg: CfgNode) -> list[str]:
    """The names that MODEL.VISFT.OBJECTIVES may have: those of the nodes with a key OBJECTIVE."""
    nodes = cfg.MODEL.VISFT.items()
    return [key.lower() for key, value in nodes if isinstance(value, CfgNode) and "OBJECTIVE" in value]


def objective_class(cfg: CfgNode, name: str) -> type[Objective]:
    """The class of the objective `name`.

    Raises:
        ConfigError: there is no node MODEL.VISFT.<NAME>, or its OBJECTIVE is not registered.
    """
    check_one_of("MODEL.VISFT.OBJECTIVES", name, objective_names(cfg))
    wanted = cfg.MODEL.VISFT[name.upper()].OBJECTIVE
    classes = [entry for entry, _ in VISFT_OBJECTIVES_REGISTRY]
    check_one_of(f"MODEL.VISFT.{name.upper()}.OBJECTIVE", wanted, classes)
    return VISFT_OBJECTIVES_REGISTRY.get(wanted)


def build_objectives(cfg: CfgNode, backbone: CLIPViT) -> ObjectiveGroup:
    """The objectives of MODEL.VISFT.OBJECTIVES, of a tower that is not tuned yet; none without stage `lora`.

    Raises:
        ConfigError: a name is unknown, or a key out of range.
    """
    names = tuple(cfg.MODEL.VISFT.OBJECTIVES) if "lora" in cfg.VISFT.STAGES else ()
    built = {name: objective_class(cfg, name)(cfg, name, backbone) for name in names}
    original = OriginalTower(backbone) if any(part.needs_original for part in built.values()) else None
    return ObjectiveGroup(built, original)
