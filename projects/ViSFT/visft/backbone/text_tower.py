"""The frozen text side of the CLIP that a tower came from."""

from collections.abc import Sequence

import torch
from torch import nn

from . import open_clip_zoo
from .clip_vit import CLIPViT


class TextTower:
    """Text embeddings of the base CLIP. No module: it is in no state and no checkpoint.

    Args:
        backbone: made by `CLIPViT.from_open_clip`.

    Attributes:
        logit_scale: what CLIP multiplies cosines by, of the base (about 100).

    Raises:
        ConfigError: the backbone was made of a bare tower.
    """

    def __init__(self, backbone: CLIPViT) -> None:
        with torch.random.fork_rng(devices=[]):  # a CLIP draws weights before it loads some
            self._clip = backbone.base_clip()
        if self._clip.visual is not backbone.tower:  # a random base is the very one that is tuned
            self._clip.visual = nn.Identity()
            self._clip.eval().requires_grad_(False)
        self._tokenizer = open_clip_zoo.open_clip().get_tokenizer(backbone.base.name)
        self.logit_scale = float(self._clip.logit_scale.detach().exp())

    def tokens(self, lines: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """What the tower sees of lines, `[N, L]`: equal rows have equal embeddings."""
        return self._tokenizer(list(lines)).to(device)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `[N, D]` of unit length, float32, of `tokens`."""
        self._clip.to(tokens.device)
        return nn.functional.normalize(self._clip.encode_text(tokens).float(), dim=-1)
