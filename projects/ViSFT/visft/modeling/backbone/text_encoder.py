"""The frozen text side of the CLIP that a tower came from."""

from collections.abc import Sequence

import torch
from torch import nn

from visft.checkpoint import open_clip_models
from visft.errors import ConfigError
from visft.modeling.backbone.clip_vit import CLIPViT


class TextTower:
    """Text embeddings of the base CLIP. No module: it is in no state and no checkpoint.

    Args:
        backbone: made by `CLIPViT.from_open_clip`.

    Attributes:
        logit_scale: the base's factor on cosines (about 100).
        logit_bias: what a SigLIP adds to them then; None where the base has none.
        sha256: of the base's weights, which the embeddings follow from; "" where they are random.

    Raises:
        ConfigError: the backbone was made of a bare tower, or the tokenizer cannot be downloaded.
    """

    def __init__(self, backbone: CLIPViT) -> None:
        with torch.random.fork_rng(devices=[]):  # a CLIP draws weights before it loads some
            self._clip = backbone.base_clip(visual=False)
        if self._clip.visual is not backbone.tower:  # a random base is the very one that is tuned
            self._clip.eval().requires_grad_(False)
        name = backbone.base.name
        try:
            self._tokenizer = open_clip_models.open_clip().get_tokenizer(name)
        except Exception as error:  # a hub that is out of reach raises what its client happens to
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"the tokenizer of {name} could not be had ({reason}); download it once where the "
                "hub can be reached, or leave out what reads texts"
            ) from error
        self.logit_scale = float(self._clip.logit_scale.detach().exp())
        bias = getattr(self._clip, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach())
        self.sha256 = backbone.base.sha256 if backbone.base.pretrained else ""

    def tokens(self, lines: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """Tokens of lines `[N, L]`; equal rows have equal embeddings."""
        return self._tokenizer(list(lines)).to(device)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `[N, D]` of unit length, float32, of `tokens`."""
        self._clip.to(tokens.device)
        return nn.functional.normalize(self._clip.encode_text(tokens).float(), dim=-1)
