"""The towers that are compared: whole CLIPs of one architecture."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from visft.backbone import CLIPViT, open_clip_zoo
from visft.checkpoint import files
from visft.errors import CheckpointError, ConfigError


class Tower:
    """A CLIP in evaluation mode, its pictures' and texts' embeddings and its map of features.

    Args:
        name: an architecture that open_clip knows.
        pretrained: a tag, or a file of the whole CLIP.
        label: for reports.
        device: None: a GPU where there is one.

    Raises:
        ConfigError, CheckpointError: as `open_clip_zoo.create_clip`.
    """

    def __init__(
        self, name: str, pretrained: str | None, *, label: str = "base", device: str | None = None
    ) -> None:
        self.name, self.label = name, label
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.clip, base = open_clip_zoo.create_clip(name, pretrained)
        self.clip.to(self.device).requires_grad_(False)
        self.sha256 = base.sha256
        self.text_sha256 = _digest(self.clip)
        visual = self.clip.visual
        try:
            self.backbone: CLIPViT | None = CLIPViT(visual, base=base)
        except ConfigError:
            self.backbone = None  # no plain vision transformer: it has an embedding, and no map
        preprocess = getattr(visual, "preprocess_cfg", None) or {}
        mean = preprocess.get("mean") or open_clip_zoo.OPENAI_MEAN
        std = preprocess.get("std") or open_clip_zoo.OPENAI_STD
        self._mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(3, 1, 1)
        size = visual.image_size
        self.image_size = tuple(size) if isinstance(size, Sequence) else (size, size)
        self._tokenizer = None

    @property
    def has_map(self) -> bool:
        """Whether `encode` can give dense features."""
        return self.backbone is not None

    def input_size(self, scale: float) -> tuple[int, int]:
        """`(height, width)` in pixels: the native size times `scale`, in whole patches where it is not native."""
        if scale == 1:
            return self.image_size
        if self.backbone is None:
            raise ConfigError(
                f"{self.label}: {self.name} is no plain vision transformer and sees its native size alone; leave the "
                "benchmarks on larger pictures out"
            )
        patch = self.backbone.stride
        return tuple(patch * max(1, round(side * scale / patch)) for side in self.image_size)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, dense: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass.

        Args:
            images: `[N, 3, H, W]` uint8 RGB.
            dense: whether the map is wanted.

        Returns:
            Embeddings `[N, D]`, not of unit length, and the map `[N, C, h, w]` or None; float32 on the CPU.
        """
        images = (images.to(self.device).float() / 255 - self._mean) / self._std
        if self.backbone is None:
            return self.clip.encode_image(images, normalize=False).float().cpu(), None
        maps, embedding = self.backbone.map_and_embedding(images)
        return embedding.float().cpu(), maps.float().cpu() if dense else None

    @torch.no_grad()
    def text(self, lines: Sequence[str], batch: int = 256) -> torch.Tensor:
        """Text embeddings `[len(lines), D]`, of unit length, float32 on the CPU."""
        if self._tokenizer is None:
            self._tokenizer = open_clip_zoo.open_clip().get_tokenizer(self.name)
        parts = []
        for start in range(0, len(lines), batch):
            tokens = self._tokenizer(list(lines[start : start + batch])).to(self.device)
            parts.append(self.clip.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(parts)


def _digest(clip: torch.nn.Module) -> str:
    """SHA-256 of all tensors but the vision tower's: fine-tuning leaves them, and text embeddings can be shared."""
    digest = hashlib.sha256()
    for name, tensor in clip.state_dict().items():
        if not name.startswith("visual."):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check(name: str, pretrained: str, compare: Sequence[str]) -> None:
    """Check what can be checked of the towers without loading one.

    Raises:
        ConfigError: the architecture or tag is unknown.
        CheckpointError: a file is missing or no weight file, or lacks what the others have.
    """
    open_clip_zoo.check_name(name)
    for option, given in (("--pretrained", pretrained), *(("--compare", file) for file in compare)):
        try:
            open_clip_zoo.check_pretrained(name, given)
            if os.path.isfile(given):
                shapes = files.read_shapes(given)
                if not any(key.startswith("visual.") for key in shapes):
                    raise CheckpointError(
                        f"{given}: holds no whole CLIP (no names beginning with `visual.`); a tower and its text tower "
                        "were expected, as tools/export_backbone.py --format open_clip writes them."
                    )
        except (ConfigError, CheckpointError) as error:
            message = (
                str(error)
                .removeprefix("MODEL.CLIP_VIT.PRETRAINED: ")
                .replace("MODEL.CLIP_VIT.PRETRAINED", "it")
            )
            raise type(error)(f"{option} {given}: {message.removeprefix(f'{given}: ')}") from error


def labels(compare: Sequence[str]) -> list[str]:
    """Short names for files: the stem, with as many folders before it as tell them apart."""
    if not compare:
        return []
    parts = [Path(file).resolve().with_suffix("").parts for file in compare]
    for depth in range(1, 1 + max((len(p) for p in parts), default=0)):
        found = ["/".join(p[-depth:]) for p in parts]
        if len(set(found)) == len(found) and "base" not in found:
            return found
    raise ConfigError("--compare: the same file is given twice; take one out")
