"""A cache of a frozen tower's features. Computing them is most of the time of stage `heads` on small towers."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator

import torch
from torch import nn

logger = logging.getLogger(__name__)


class FeatureCache:
    """Memoises the forward of a frozen backbone, image by image.

    The key is the content of a normalised, padded image, so every augmented view has its own entry. Each image is
    computed by itself, so its features do not depend on the rest of the batch, and a resumed run (with an empty cache)
    gets the same bits. When the memory is full, other images are computed without the cache. Nothing is evicted,
    because a data set is read cyclically.

    Args:
        backbone: maps `[N, 3, H, W]` to a dict of `[N, C, h, w]`; must not change while it is cached.
        gibibytes: memory for features per process, on the device of the features.
    """

    def __init__(self, backbone: nn.Module, gibibytes: float) -> None:
        self._forward = backbone.forward
        self._room = int(gibibytes * 2**30)
        self._entries: dict[bytes, dict[str, torch.Tensor]] = {}
        self.hits = self.misses = 0
        self._bypassed = False

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Within the block, compute whole batches and cache nothing, for evaluation."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[N, 3, H, W]` -> the backbone's maps, `[N, C, h, w]` each."""
        if self._bypassed:
            return self._forward(images)
        features = [self._one(image[None]) for image in images]
        return {name: torch.cat([entry[name] for entry in features]) for name in features[0]}

    def _one(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        raw = image.detach().float().cpu().contiguous()
        key = hashlib.blake2b(
            raw.numpy(), digest_size=16, person=repr(tuple(raw.shape[2:])).encode()[:16]
        ).digest()
        found = self._entries.get(key)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        features = {name: value.detach() for name, value in self._forward(image).items()}
        size = sum(value.numel() * value.element_size() for value in features.values())
        if self._room >= size:
            self._room -= size
            self._entries[key] = features
            if self._room < size:
                logger.info("feature cache: full with %d images", len(self._entries))
        return features


@contextlib.contextmanager
def cached_features(backbone: nn.Module, gibibytes: float) -> Iterator[FeatureCache]:
    """Within the block, `backbone(images)` uses a FeatureCache. With 0 GiB, nothing changes."""
    cache = FeatureCache(backbone, gibibytes)
    if gibibytes <= 0:
        yield cache
        return
    backbone.forward = cache.forward  # hides the class's method until it is deleted
    try:
        yield cache
    finally:
        del backbone.forward
        logger.info("feature cache: %d hits in %d lookups", cache.hits, cache.hits + cache.misses)
