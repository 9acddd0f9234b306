"""Augmented views of single emoji that no fine-tuning scene contains. Several demo benchmarks share them."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from demoworld import augment, catalogue, tower
from towerbench.features import Images

SIZE = 64
"""Side of a view in pixels."""

TEMPLATES = tower.TEMPLATES
_CHUNK = 128


@functools.cache
def unseen() -> tuple[int, ...]:
    """Return the indices into `catalogue()` of the emoji that are no category of the scenes."""
    return tuple(i for i, emoji in enumerate(catalogue.catalogue()) if emoji.coco_id is None)


def names(indices: Sequence[int]) -> list[str]:
    """Return the English names of emoji."""
    everything = catalogue.catalogue()
    return [everything[i].name for i in indices]


def of_split(split: str) -> list[int]:
    """Return one half of `unseen()`. The other split has the other half."""
    order = np.random.default_rng(0).permutation(len(unseen()))
    return [unseen()[i] for i in np.sort(order[(split == "development") :: 2])]


@functools.cache
def _bank(folder: Path | None) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return a vendor's drawings `[N, 4, SIZE, SIZE]`, premultiplied, and the index into `catalogue()` of each."""
    if folder is None:
        rendered, indices = catalogue.openmoji_images(), range(len(catalogue.catalogue()))
    else:
        rendered, indices = catalogue.other_images(folder)
    return augment.premultiplied(torch.from_numpy(rendered), SIZE), tuple(indices)


def drawn_by(folder: Path | None) -> set[int]:
    """Return the indices into `catalogue()` of what a vendor has drawn. None: the base vendor."""
    return set(_bank(folder)[1])


def _source(folder: Path | None) -> str:
    if folder is None:
        return "openmoji"
    listing = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(folder).iterdir())
    ]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def views(indices: Sequence[int], per_emoji: int, seed: int, *, folder: Path | None = None) -> Images:
    """Return `per_emoji` augmented views of each emoji. The views of one emoji are next to each other.

    Args:
        indices: into `catalogue()`.
        folder: another vendor's drawings. None: the base vendor's.
    """
    key = f"emoji views/{_source(folder)}/{_short(indices)}/{per_emoji}/{seed}"

    def make() -> Iterator[np.ndarray]:
        bank, order = _bank(folder)
        place = {index: i for i, index in enumerate(order)}
        flippable = torch.tensor([catalogue.may_flip(name) for name in names(order)])
        rows = torch.tensor([place[i] for i in indices]).repeat_interleave(per_emoji)
        for number, chunk in enumerate(rows.split(_CHUNK)):
            digest = hashlib.sha256(f"{key}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            yield from as_images(augment.augmented_views(bank, chunk, flippable, generator))

    return Images(key, len(indices) * per_emoji, make)


def as_images(images: torch.Tensor) -> np.ndarray:
    """Convert CLIP-normalised `[N, 3, H, W]` to `[N, H, W, 3]` uint8."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.CLIP_MEAN, augment.CLIP_STD))
    pixels = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _short(indices: Sequence[int]) -> str:
    keys = [catalogue.catalogue()[i].key for i in indices]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
