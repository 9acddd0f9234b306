"""Comparable views of feature maps: principal components, similarity to texts, and matches. Tensors only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROBUST = (0.01, 0.99)
"""Quantiles that bound a range of values, so that single patches do not decide the contrast."""


@dataclass(frozen=True)
class Components:
    """Principal components of features of unit length, and the range of values along each.

    Args:
        mean: `[C]`.
        directions: `[K, C]`, orthonormal, by decreasing variance.
        low, high: `[K]`, see `ROBUST`.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Coordinates `[..., K]` of features `[..., C]` of any length."""
        return (F.normalize(features, dim=-1) - self.mean) @ self.directions.T


def principal_components(groups: Sequence[torch.Tensor], count: int = 3) -> Components:
    """The basis in which several towers' features are shown.

    It is fitted on all towers together, so equal features have equal colours in every image. One tower's basis would
    hide directions that only another tower uses. Features are scaled to unit length and towers weigh the same.

    Args:
        groups: features `[N, C]` of each tower, of the same images.
        count: K.

    Raises:
        ValueError: fewer than `count` features or channels.
    """
    groups = [F.normalize(group.flatten(0, -2).double(), dim=-1) for group in groups]
    rows = torch.cat(groups)
    if min(rows.shape) < count:
        raise ValueError(f"{count} components were asked for of {rows.shape[0]} features of {rows.shape[1]}")
    weights = torch.cat([rows.new_full((len(group),), 1 / len(group) / len(groups)) for group in groups])
    mean = weights @ rows
    centred = rows - mean
    # Eigenvectors of the covariance [C, C]: the features may be many more than the channels.
    _, vectors = torch.linalg.eigh(centred.T @ (weights[:, None] * centred))
    directions = vectors.T.flip(0)[:count]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    low, high = torch.quantile(_some(centred) @ directions.T, torch.tensor(ROBUST).double(), dim=0)
    return Components(*(tensor.float() for tensor in (mean, directions, low, high)))


def colours(features: torch.Tensor, components: Components) -> torch.Tensor:
    """RGB in 0..1 `[..., 3]` of features `[..., C]`: the first three components, clipped to their range."""
    span = (components.high - components.low).clamp(min=1e-12)
    return ((components.project(features) - components.low) / span).clamp(0, 1)[..., :3]


def similarity_maps(patches: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosines `[T, h, w]` of patch embeddings `[h, w, D]` and text embeddings `[T, D]`, of any length."""
    return torch.einsum("hwd,td->thw", F.normalize(patches, dim=-1), F.normalize(texts, dim=-1))


def value_range(maps: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The common range `(low, high)` of maps of any shapes, see `ROBUST`; never empty."""
    values = torch.cat([_some(each.flatten().double()[:, None])[:, 0] for each in maps])
    low, high = torch.quantile(values, torch.tensor(ROBUST).double()).tolist()
    return low, max(high, low + 1e-6)


def mutual_matches(
    first: torch.Tensor, second: torch.Tensor, count: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of features that are each other's nearest neighbour by cosine.

    Args:
        first: `[N, C]`. second: `[M, C]`.
        count: keep only so many of the most similar pairs; None: all.

    Returns:
        Indices `[K, 2]` into both and cosines `[K]`, the most similar pair first.
    """
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    there, back = cosines.argmax(1), cosines.argmax(0)
    own = torch.arange(len(first), device=first.device)
    mutual = own[back[there] == own]
    pairs = torch.stack((mutual, there[mutual]), 1)
    similar = cosines[pairs[:, 0], pairs[:, 1]]
    order = similar.argsort(descending=True, stable=True)[:count]
    return pairs[order], similar[order]


def _some(rows: torch.Tensor, most: int = 1_000_000) -> torch.Tensor:
    """Rows at even steps if there are more than `most`: torch.quantile refuses 16 million values."""
    return rows[:: -(-len(rows) // most)]
