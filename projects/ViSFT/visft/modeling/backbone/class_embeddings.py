"""Text embeddings of class names in prompts: computed once, kept in the user's cache by what they depend on."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visft.checkpoint import files
from visft.errors import CheckpointError, ConfigError
from visft.modeling.backbone.text_encoder import TextTower
from visft.utils.user_cache import cache_folder

logger = logging.getLogger(__name__)

PROMPTS = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven that OpenAI found to do nearly as well as all eighty (notebook of prompts beside CLIP's code)."""

_BATCH = 256


@dataclass(frozen=True)
class ClassText:
    """Classifiers from text.

    Classes whose names are the same to the tokenizer share a row.
    """

    embeddings: Tensor
    """`[K, D]`, of unit length, float32."""
    rows: Tensor
    """`[number of classes]` int64: the row of each class."""
    names: tuple[str, ...]
    """`[K]`: the name of each row."""


def check_prompts(key: str, prompts: Sequence[str]) -> None:
    """Check that prompts have a place for the name.

    Raises:
        ConfigError: there is none, or one has no `{}` or several.
    """
    wrong = [prompt for prompt in prompts if prompt.count("{}") != 1 or prompt.count("{") != 1]
    if wrong or not prompts:
        found = f"has `{wrong[0]}`" if wrong else "is empty"
        raise ConfigError(f"{key} {found}; expected prompts such as `a photo of a {{}}.`, each with one {{}}")


def class_text(
    text: TextTower, classes: Sequence[Sequence[str]], prompts: Sequence[str] = PROMPTS
) -> ClassText:
    """Text embeddings of classes: the mean over synonyms and prompts, of unit length (CLIP, section 3.1.4).

    Args:
        text: the text encoder.
        classes: for each class its names, at least one.
        prompts: each with one `{}`, the place of a name.

    Raises:
        ConfigError: there is no class.
    """
    if not classes:
        raise ConfigError("there are no class names to compare regions with; give at least one")
    plain = text.tokens([name for names in classes for name in names])
    first: dict[frozenset, int] = {}
    rows, kept = [], []
    for number, part in enumerate(plain.split([len(names) for names in classes])):
        key = frozenset(map(tuple, part.tolist()))
        if key not in first:
            first[key] = len(kept)
            kept.append(number)
        rows.append(first[key])
    lines = [prompt.format(name) for number in kept for name in classes[number] for prompt in prompts]
    embeddings = _embed(text, text.tokens(lines))
    counts = [len(classes[number]) * len(prompts) for number in kept]
    means = torch.stack([part.mean(0) for part in embeddings.split(counts)])
    return ClassText(
        F.normalize(means, dim=-1), torch.tensor(rows), tuple(classes[number][0] for number in kept)
    )


def _embed(text: TextTower, tokens: Tensor) -> Tensor:
    """Embeddings `[N, D]` of tokens `[N, L]`, from the cache where they are.

    The file's name is a hash of the base's weights and of the tokens, which the tokenizer decides: another tokenizer,
    prompt or name is another file.
    """
    if not text.sha256:
        return _compute(text, tokens)
    digest = hashlib.sha256(f"{text.sha256} {tuple(tokens.shape)}".encode())
    digest.update(tokens.cpu().to(torch.int64).numpy().tobytes())
    file = cache_folder() / f"class-text-{digest.hexdigest()[:24]}.safetensors"
    if file.is_file():
        try:
            return files.read_tensors(file)["embeddings"]
        except (CheckpointError, KeyError):
            logger.info("%s cannot be read and is made again", file)
    embeddings = _compute(text, tokens)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(file, {"embeddings": embeddings}, {"base": text.sha256})
    except (OSError, CheckpointError) as error:
        logger.info("text embeddings are not cached: %s", error)
    return embeddings


def _compute(text: TextTower, tokens: Tensor) -> Tensor:
    return torch.cat([text(part).cpu() for part in tokens.split(_BATCH)])
