"""The compared towers: whole CLIPs of one architecture."""

import difflib
import hashlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from towerbench.encoder import Encoder, OpenClipEncoder
from towerbench.errors import CheckpointError, ConfigError


class Tower:
    """A CLIP in evaluation mode, with embeddings of images and texts, and feature maps.

    Args:
        clip: a model of open_clip, in float32.
        encoder: computes its maps at any size. None: it has no maps, because it is not a plain vision transformer.
        name: of its architecture.
        sha256: of its weights. Scores are stored under it.
        label: for reports.
        device: None: a GPU if there is one.
    """

    def __init__(
        self,
        clip: nn.Module,
        encoder: Encoder | None,
        *,
        name: str,
        sha256: str,
        label: str = "base",
        device: str | None = None,
    ) -> None:
        self.name, self.label, self.sha256 = name, label, sha256
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.clip = clip.eval().to(self.device).requires_grad_(False)
        self.encoder = encoder
        self.text_sha256 = _digest(clip)
        preprocess = getattr(clip.visual, "preprocess_cfg", None) or {}
        constants = open_clip()
        mean = preprocess.get("mean") or constants.OPENAI_DATASET_MEAN
        std = preprocess.get("std") or constants.OPENAI_DATASET_STD
        self._mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(3, 1, 1)
        size = clip.visual.image_size
        self.image_size = tuple(size) if isinstance(size, Sequence) else (size, size)
        self._tokenizer = None

    @classmethod
    def load(cls, name: str, pretrained: str, *, label: str = "base", device: str | None = None) -> "Tower":
        """Load a CLIP by open_clip. Nothing is unpickled.

        Args:
            name: an architecture that open_clip knows, or `visft-tiny`.
            pretrained: a tag, or a file of the whole CLIP.

        Raises:
            ConfigError: an unknown name or tag.
            CheckpointError: the weights are not available, or are of another model.
        """
        check(name, pretrained)
        module = open_clip()
        tag = module.get_pretrained_cfg(name, pretrained)
        try:
            file = module.download_pretrained(tag) if tag else pretrained
            quick = bool(
                (tag or {}).get("quick_gelu")
            )  # with the other activation, weights silently get worse
            clip = module.create_model(name, pretrained, weights_only=True, force_quick_gelu=quick)
        except Exception as error:  # open_clip, its hub and torch raise many kinds of errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{pretrained}: cannot be had or loaded as a whole {name} ({reason}); give a file of this "
                "architecture as open_clip writes it"
            ) from error
        encoder = OpenClipEncoder(clip.visual) if OpenClipEncoder.fits(clip.visual) else None
        return cls(clip, encoder, name=name, sha256=_sha256(file), label=label, device=device)

    @property
    def has_map(self) -> bool:
        """Whether `encode` can give dense features."""
        return self.encoder is not None

    def input_size(self, scale: float) -> tuple[int, int]:
        """Return `(height, width)` in pixels: the native size times `scale`, in whole patches if it is not native."""
        if scale == 1:
            return self.image_size
        if self.encoder is None:
            raise ConfigError(
                f"{self.label}: {self.name} is no plain vision transformer and sees its native size alone; leave the "
                "benchmarks on larger images out"
            )
        patch = self.encoder.stride
        return tuple(patch * max(1, round(side * scale / patch)) for side in self.image_size)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, dense: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one forward pass.

        Args:
            images: `[N, 3, H, W]` uint8 RGB.
            dense: whether to return the map.

        Returns:
            Embeddings `[N, D]`, not of unit length, and the map `[N, C, h, w]` or None; float32 on the CPU.
        """
        images = (images.to(self.device).float() / 255 - self._mean) / self._std
        if self.encoder is None:
            return self.clip.encode_image(images, normalize=False).float().cpu(), None
        maps, embedding = self.encoder.map_and_embedding(images)
        return embedding.float().cpu(), maps.float().cpu() if dense else None

    @torch.no_grad()
    def text(self, lines: Sequence[str], batch: int = 256) -> torch.Tensor:
        """Return text embeddings `[len(lines), D]`, of unit length, float32 on the CPU."""
        if self._tokenizer is None:
            self._tokenizer = open_clip().get_tokenizer(self.name)
        parts = []
        for start in range(0, len(lines), batch):
            tokens = self._tokenizer(list(lines[start : start + batch])).to(self.device)
            parts.append(self.clip.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(parts)


def open_clip() -> ModuleType:
    """Return the module open_clip with the demo tower registered, importing it if necessary."""
    from demoworld import tower

    module = importlib.import_module("open_clip")
    tower.register(module)
    return module


def _digest(clip: nn.Module) -> str:
    """SHA-256 of all tensors outside the vision tower. Fine-tuning keeps them, so text embeddings can be shared."""
    digest = hashlib.sha256()
    for name, tensor in clip.state_dict().items():
        if not name.startswith("visual."):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check(name: str, pretrained: str, compare: Sequence[str] = ()) -> None:
    """Check names and files without loading one.

    Raises:
        ConfigError: the architecture or tag is unknown.
        CheckpointError: a file is missing.
    """
    module = open_clip()
    if name not in (known := module.list_models()):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--model {name}: open_clip does not know it; the nearest name is '{near}'")
    for option, given in (("--pretrained", pretrained), *(("--compare", file) for file in compare)):
        if module.get_pretrained_cfg(name, given) or os.path.isfile(given):
            continue
        tags = ", ".join(module.list_pretrained_tags_by_model(name)) or "none"
        if os.sep in given or Path(given).suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
            raise CheckpointError(
                f"{option} {given}: does not exist; give a weight file or a tag of {name} ({tags})"
            )
        raise ConfigError(f"{option} {given}: neither a file nor a tag of {name}; its tags are: {tags}")


def labels(compare: Sequence[str]) -> list[str]:
    """Return short names for files: the stem, with as many folders before it as are needed to distinguish them."""
    if not compare:
        return []
    parts = [Path(file).resolve().with_suffix("").parts for file in compare]
    for depth in range(1, 1 + max((len(p) for p in parts), default=0)):
        found = ["/".join(p[-depth:]) for p in parts]
        if len(set(found)) == len(found) and "base" not in found:
            return found
    raise ConfigError("--compare: the same file is given twice; take one out")
