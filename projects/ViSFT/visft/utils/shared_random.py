"""Random numbers that are equal in all processes, for points, captions and classes. Dropout differs per process."""

import contextlib
import zlib
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


def peek() -> int:
    """The next `number`, without drawing it: what is drawn afterwards stays the same."""
    state = generator().get_state()
    drawn = number()
    generator().set_state(state)
    return drawn


def image_generator(
    draw: int, image: dict, index: int, purpose: str = "", device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator for one image in one pass, the same whatever process and batch the image is in.

    Args:
        draw: the pass's `number`.
        image: a mapped dict, known by its `image_id`, else its `file_name`, else `index`.
        purpose: separates what is drawn for different purposes.
    """
    key = str(image.get("image_id", image.get("file_name", index))) + purpose
    return torch.Generator(device).manual_seed(draw ^ zlib.crc32(key.encode()))
