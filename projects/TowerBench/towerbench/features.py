"""Sets of images, and a tower's features of them. Each image passes a tower only once, for all benchmarks."""

import itertools
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from towerbench.encoder import patch_embeddings
from towerbench.errors import ConfigError
from towerbench.towers import Tower

logger = logging.getLogger(__name__)

_Made = TypeVar("_Made")

BATCH_PIXELS, BATCH_PIXELS_CPU = 64 * 128 * 128, 8 * 128 * 128
"""Pixels per batch: much for a GPU, for a CPU no more than its caches hold."""

FITS = ("squash", "crop")

FOLDER = ".features-"
"""Prefix of a store's temporary folder, before its machine and process."""


@dataclass(frozen=True)
class Images:
    """A reproducible set of images.

    Args:
        key: everything that the images depend on (source, seed, size, processing). Two sets with the same key, scale
            and fit count as the same, and are encoded once.
        count: number of images.
        make: a function that yields them in order, `[H, W, 3]` uint8 RGB, of any sizes.
        scale: side of the tower's input, relative to its native side.
        fit: `squash`: both sides are resized to it, so that coordinates scale alone. `crop`: the shorter side is, and
            the middle is cut out, as CLIP is evaluated.
        dense: whether `FeatureStore.dense` will be called. If not, only embeddings are kept.
    """

    key: str
    count: int
    make: Callable[[], Iterable[np.ndarray]]
    scale: float = 1.0
    fit: str = "squash"
    dense: bool = False

    @property
    def identity(self) -> tuple[str, float, str]:
        """Equal for two sets that count as the same."""
        return self.key, self.scale, self.fit


class FeatureStore:
    """A tower's features of sets of images, computed when they are first needed and kept until released.

    Embeddings are in memory, dense features in float16 in a temporary file, which the system pages in and out.

    Args:
        tower: computes them.
        announced: all sets that will be used. If one of several with the same identity is `dense`, the images pass the
            tower once for both kinds of features.
        folder: for the temporary file. None: the system's. Leftovers of killed processes are removed.
        texts: embeddings of lines by this tower's text tower, which are added to; towers that share it may share them.
        progress: called after each batch, with the set and how many of its images have passed in it.
    """

    def __init__(
        self,
        tower: Tower,
        announced: Iterable[Images] = (),
        *,
        folder: Path | None = None,
        texts: dict[str, torch.Tensor] | None = None,
        progress: Callable[[Images, int], None] = lambda images, count: None,
    ) -> None:
        self.tower, self.progress = tower, progress
        self._dense_wanted = {images.identity for images in announced if images.dense}
        if folder is not None:
            remove_leftovers(folder)
        prefix = f"{FOLDER}{socket.gethostname()}-{os.getpid()}-"
        self._folder = tempfile.TemporaryDirectory(prefix=prefix, dir=folder)
        self._numbers = itertools.count()
        self._embeddings: dict[tuple, torch.Tensor] = {}
        self._maps: dict[tuple, np.memmap] = {}
        self._texts = {} if texts is None else texts
        self._made: dict[Hashable, Any] = {}

    def embeddings(self, images: Images) -> torch.Tensor:
        """Return the CLIP embeddings `[count, D]`, float32 on the CPU, of unit length."""
        self._compute(images)
        return self._embeddings[images.identity]

    def dense(self, images: Images, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the last map `[stop - start, C, h, w]` of images `start` to `stop`, float32 on the CPU.

        Raises:
            ConfigError: the tower has no map (it is no plain vision transformer).
        """
        self._compute(images, dense=True)
        return torch.from_numpy(self._maps[images.identity][start:stop].astype(np.float32))

    def text(self, lines: Sequence[str]) -> torch.Tensor:
        """Return the text encoder's embeddings `[len(lines), D]`, of unit length. Each line is encoded once."""
        new = [line for line in dict.fromkeys(lines) if line not in self._texts]
        if new:
            self._texts |= dict(zip(new, self.tower.text(new), strict=True))
        return torch.stack([self._texts[line] for line in lines])

    def class_embeddings(
        self, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> torch.Tensor:
        """Return zero-shot classifiers `[len(names), D]`: means over templates, of unit length (CLIP, 3.1.4)."""
        total = sum(self.text([template.format(name) for name in names]) for template in templates)
        return torch.nn.functional.normalize(total, dim=-1)

    @torch.no_grad()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project patch features, or their means, `[..., C]` -> `[..., D]` of unit length, comparable with `text`."""
        return patch_embeddings(self.tower.clip.visual, features).cpu()

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Return the result of the first `make` for a key, so that benchmarks share a readout that depends only on this
        tower's features."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def release(self, images: Images) -> None:
        """Drop a set's features."""
        self._embeddings.pop(images.identity, None)
        held = self._maps.pop(images.identity, None)
        if held is not None:
            Path(held.filename).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the temporary file."""
        self._maps.clear()
        self._folder.cleanup()

    def _compute(self, images: Images, dense: bool = False) -> None:
        identity = images.identity
        if identity in self._embeddings and (not dense or identity in self._maps):
            return
        dense = dense or images.dense or identity in self._dense_wanted
        if dense and not self.tower.has_map:
            raise ConfigError(
                f"{self.tower.label}: this tower has no map of features; leave the dense benchmarks out"
            )
        embeddings, done = [], 0
        for batch in self._batches(images):
            embedding, maps = self.tower.encode(batch, dense=dense)
            embeddings.append(embedding)
            if maps is not None:
                if identity not in self._maps:
                    file = Path(self._folder.name) / f"{next(self._numbers)}.bin"
                    shape = (images.count, *maps.shape[1:])
                    self._maps[identity] = np.memmap(file, np.float16, mode="w+", shape=shape)
                self._maps[identity][done : done + len(batch)] = maps.to(torch.float16).numpy()
            done += len(batch)
            self.progress(images, len(batch))
        if done != images.count:
            raise ConfigError(f"the set `{images.key}` said {images.count} images and made {done}")
        self._embeddings[identity] = torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)

    def _batches(self, images: Images) -> Iterator[torch.Tensor]:
        """Yield `[N, 3, H, W]` uint8 batches of the tower's input size."""
        height, width = self.tower.input_size(images.scale)
        pixels = BATCH_PIXELS_CPU if torch.device(self.tower.device).type == "cpu" else BATCH_PIXELS
        size, rows = max(1, pixels // (height * width)), []
        for image in images.make():
            rows.append(torch.from_numpy(fitted(image, height, width, images.fit)).permute(2, 0, 1))
            if len(rows) == size:
                yield torch.stack(rows)
                rows = []
        if rows:
            yield torch.stack(rows)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders in `folder` of processes of this machine that no longer exist."""
    for path in folder.glob(f"{FOLDER}*"):
        owner = re.fullmatch(f"{re.escape(FOLDER + socket.gethostname())}-(\\d+)-[^-]*", path.name)
        if owner is None:
            continue
        try:
            os.kill(int(owner[1]), 0)  # sends nothing
        except ProcessLookupError:
            logger.info("%s: left by a run that was killed, removed", path)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # another user's process


def fitted(image: np.ndarray, height: int, width: int, fit: str = "squash") -> np.ndarray:
    """Resize an image `[H, W, 3]` uint8 to `[height, width, 3]`, bicubic and antialiased like CLIP; see `Images`."""
    if fit not in FITS:
        raise ConfigError(f"a set of images has fit `{fit}`; choose one of {', '.join(FITS)}")
    if image.shape[:2] == (height, width):
        return np.array(image)
    shown = Image.fromarray(image)
    if fit == "crop":
        factor = max(height / shown.height, width / shown.width)
        shown = shown.resize(
            (max(width, round(shown.width * factor)), max(height, round(shown.height * factor))),
            Image.Resampling.BICUBIC,
        )
        left, top = (shown.width - width) // 2, (shown.height - height) // 2
        return np.array(shown.crop((left, top, left + width, top + height)))
    return np.array(shown.resize((width, height), Image.Resampling.BICUBIC))
