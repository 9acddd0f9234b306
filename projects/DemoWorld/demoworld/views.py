"""Views of single emoji: captioned batches for pretraining, and batches for evaluation."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from demoworld import augment, catalogue, tower


def step_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """Return a generator that depends only on the three arguments."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class Views:
    """Makes batches of distinct emoji with captions, and the evaluation's batches, for any image size.

    Args:
        classes: number of emoji to use, from the first (0: all).
        folders: further vendors' images (`catalogue.other_images`), sampled as often as OpenMoji's.
        held_out: folders of vendors that only `evaluation` shows, numbered after the others.
    """

    def __init__(
        self,
        classes: int = 0,
        folders: Sequence[str | Path] = (),
        held_out: Sequence[str | Path] = (),
    ) -> None:
        emoji = catalogue.catalogue()[: classes or None]
        self.names = [e.name for e in emoji]
        coco_names = {c.id: c.name for c in catalogue.COCO_CATEGORIES}
        self.coco_names = [coco_names.get(e.coco_id) for e in emoji]
        self.flippable = torch.tensor([catalogue.may_flip(name) for name in self.names])
        # (images, classes) of each vendor
        own = torch.from_numpy(catalogue.openmoji_images()[: len(emoji)])
        self.vendors = [(own, torch.arange(len(emoji)))]
        self.trained = 1 + len(folders)  # number of vendors in batches
        for folder in (*folders, *held_out):
            rgba, index = catalogue.other_images(folder)
            kept = torch.tensor([i < len(emoji) for i in index])
            self.vendors.append((torch.from_numpy(rgba)[kept], torch.tensor(index)[kept]))
        # where[v, c]: index of class c in vendor v's images, or -1
        self.where = torch.full((len(self.vendors), len(emoji)), -1)
        for v, (_, index) in enumerate(self.vendors):
            self.where[v, index] = torch.arange(len(index))
        self._size, self._banks = 0, []

    def _banks_of(self, size: int) -> list[torch.Tensor]:
        if size != self._size:
            self._banks = [augment.premultiplied(images, size) for images, _ in self.vendors]
            self._size = size
        return self._banks

    def batch(self, size: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """Return normalised images `[count, 3, size, size]` of distinct emoji, and a caption of each."""
        classes = torch.randperm(len(self.names), generator=generator)[:count]
        vendor = torch.randint(self.trained, (len(classes),), generator=generator)
        vendor[self.where[vendor, classes] < 0] = 0
        banks = self._banks_of(size)[: self.trained]
        bank = torch.cat(banks) if len(banks) > 1 else banks[0]
        starts = torch.tensor([0, *(len(b) for b in banks[:-1])]).cumsum(0)
        index = starts[vendor] + self.where[vendor, classes]
        flippable = torch.cat([self.flippable[i] for _, i in self.vendors[: self.trained]])
        images = augment.augmented_views(bank, index, flippable, generator)
        draws = torch.rand(len(classes), 2, generator=generator).tolist()
        captions = []
        for c, (a, b) in zip(classes.tolist(), draws, strict=True):
            # The caption sometimes has COCO's word, so that the text encoder knows both.
            name = self.coco_names[c] if self.coco_names[c] and a < 0.25 else self.names[c]
            captions.append(tower.TEMPLATES[int(b * len(tower.TEMPLATES))].format(name))
        return images, captions

    def evaluation(
        self, vendor: int = 0, size: int = 64, views: int = 2
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images and labels: every class `views` times, from seeds that training never uses."""
        images, classes = self.vendors[vendor]
        bank = self._banks_of(size)[vendor] if size == self._size else augment.premultiplied(images, size)
        for view in range(views):
            for start in range(0, len(classes), 256):
                index = torch.arange(start, min(start + 256, len(classes)))
                generator = step_generator(1_000_003 + view, "evaluation", start)
                yield augment.augmented_views(bank, index, self.flippable[classes], generator), classes[index]
