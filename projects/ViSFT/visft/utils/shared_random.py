"""Random numbers that are equal in all processes, for points, captions and classes. Dropout differs per process."""

import contextlib
from collections.abc import Iterator

import torch

_generator: torch.Generator | None = None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, `generator` has this seed, independent of the processes' global generators."""
    global _generator
    before, _generator = _generator, torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _generator = before


def generator() -> torch.Generator:
    """A generator on the CPU; outside of `seeded` the global one, as under detectron2's own trainer."""
    return _generator or torch.default_generator


def number() -> int:
    """A random number below 2^62, as a seed for other generators."""
    return int(torch.randint(2**62, (1,), generator=generator()))
