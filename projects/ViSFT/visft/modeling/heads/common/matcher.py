"""One-to-one assignment of predictions to targets."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Matched pairs of a batch, for each of L predictions (the last layer's and the auxiliary ones).

    Pairs are ordered by image, then by query; every layer has as many of an image as the smaller of its numbers of
    queries and targets.
    """

    image: Tensor
    """[M] index of the pair's image."""
    query: Tensor
    """[L, M] index of its query."""
    target: Tensor
    """[L, M] index of its target, among those of its image."""
    counts: tuple[int, ...]
    """Number of pairs of each image."""

    @property
    def predictions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the matched predictions in a tensor [L, N, Q, ...]; they give [L, M, ...]."""
        layer = torch.arange(len(self.query), device=self.query.device)[:, None]
        return layer, self.image[None], self.query

    @property
    def targets(self) -> tuple[Tensor, Tensor]:
        """Indices of the matched targets in a tensor [N, T, ...]; they give [L, M, ...]."""
        return self.image[None], self.target


def match(costs: list[Tensor]) -> Matching:
    """Assign targets to queries at the least total cost (Hungarian algorithm), for all images and layers at once.

    The costs travel to the host in one transfer, the indices back in another. Costs that are not finite count as very
    large, so that a diverged model fails by its loss and not here.

    Args:
        costs: an image's costs [L, Q, T_i], one tensor an image; T_i may be 0, and larger than Q.
    """
    # Imported here because it is slow, and not needed to build or run a model.
    from scipy.optimize import linear_sum_assignment

    device = costs[0].device
    host = torch.cat([cost.detach().flatten() for cost in costs]).cpu().double().numpy()
    host = np.nan_to_num(host, nan=1e9, posinf=1e9, neginf=-1e9)
    pairs, start, counts = [], 0, []
    for index, cost in enumerate(costs):
        layers = host[start : start + cost.numel()].reshape(cost.shape)
        start += cost.numel()
        assigned = np.stack([np.stack(linear_sum_assignment(layer)) for layer in layers])  # [L, 2, m]
        counts.append(assigned.shape[-1])
        pairs.append(np.concatenate((assigned, np.full_like(assigned[:, :1], index)), axis=1))
    indices = torch.from_numpy(np.concatenate(pairs, axis=2).astype(np.int64)).to(device)
    query, target, image = indices.unbind(1)
    return Matching(image=image[0], query=query, target=target, counts=tuple(counts))
