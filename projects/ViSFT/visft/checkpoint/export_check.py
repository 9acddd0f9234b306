"""Is what was written what was meant? Read back tensor by tensor, and run by its reader in a fresh process."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, ExportError
from .files import read_tensors, write_safetensors

READERS = Path(__file__).parent / "readers"

TOLERANCE = 2e-5
"""Largest distance of embeddings relative to their length: several times what float32 leaves between LoRA
beside the
weights and within them (5e-7 to 3e-6 on towers of 3 to 24 blocks), far below what a wrong weight does."""

LOW_PRECISION_TOLERANCE = 3e-2
"""The same where the model itself computes with weights in 16 bits and the export holds them in 32."""


def stored(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ExportError unless a file holds these tensors to the bit."""
    try:
        found = read_tensors(path)
    except CheckpointError as error:
        raise ExportError(f"What was just written does not read back: {error}") from error
    wrong = [n for n, t in tensors.items() if n not in found or not _same(found[n], t)]
    if wrong or len(found) != len(tensors):
        raise ExportError(
            f"{path.name}: {len(wrong)} tensors read back otherwise than written ({', '.join(wrong[:3])}); "
            f"is the disk "
            "sound?"
        )


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right.detach().cpu())


def open_clip(
    folder: Path, model: nn.Module, clip: nn.Module, state: Mapping[str, Tensor], *, tuned: bool
) -> None:
    """Let open_clip, in a process without us, load a folder and embed fixed pictures and texts; compare.

    Args:
        folder: with weights and open_clip_config.json.
        model: the CLIPViT; it embeds the same pictures, LoRA beside its weights where it is not merged.
        clip: the base, which embeds the same texts, and pictures by `state` where `tuned` is False.
        state: what was written.
        tuned: whether the exported tower is the model's (not a mixture with the base's).

    Raises:
        ExportError: it does not load, or an embedding differs.
    """
    size = clip.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pictures = fixed_pictures(height, width, model.mean, model.std)
    texts = fixed_texts(clip)
    if tuned:
        images = _embed(model, pictures)
    else:
        images = _embed_state(clip.visual, pictures, state)
    expected = {"images": images, "texts": _texts(clip, texts)}

    given, found = folder / "given.tensors", folder / "found.tensors"
    write_safetensors(given, {"pictures": pictures, "texts": texts})
    about = read("open_clip", folder, given, found)
    embeddings = load_file(found)
    for part, want in expected.items():
        low = tuned and part == "images" and getattr(model, "frozen_dtype", "")
        compare(part, embeddings[part], want, LOW_PRECISION_TOLERANCE if low else TOLERANCE)
    if [list(about["mean"]), list(about["std"])] != [list(model.mean), list(model.std)]:
        raise ExportError(
            f"open_clip normalises with mean {about['mean']} and std {about['std']}, the model with "
            f"{model.mean} and "
            f"{model.std}."
        )
    for file in (given, found):
        file.unlink()


def compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest relative distance between rows of embeddings `[N, D]`.

    Raises:
        ExportError: it is above the tolerance, or not a number.
    """
    if found.shape != expected.shape:
        raise ExportError(f"The reader's {what} are {list(found.shape)}, expected {list(expected.shape)}.")
    distance = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not distance <= tolerance:
        raise ExportError(
            f"The reader computes other embeddings of {what} than the model: relative distance "
            f"{distance:.1e}, allowed "
            f"{tolerance:.0e}; nothing was exported."
        )
    return distance


def read(reader: str, *arguments: os.PathLike | str) -> dict:
    """Run `readers/<reader>.py` in a fresh process that cannot see this package; returns what it prints,
    JSON.

    Raises:
        ExportError: it fails; the message has its last line.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p and not (Path(p) / "visft").is_dir()),
    }
    # By its text, not as a file: a script's own folder would be searched for modules.
    command = [sys.executable, "-c", (READERS / f"{reader}.py").read_text(encoding="utf-8")]
    command += [str(Path(argument).absolute()) for argument in arguments]
    folder = Path(arguments[0]).absolute()
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise ExportError(f"{reader} does not load the export: {lines[-1][:300]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def fixed_pictures(height: int, width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Two pictures `[2, 3, height, width]`, normalised: coloured waves, and noise. The same on every machine."""
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None]
    waves = torch.stack([0.5 + 0.5 * torch.sin(6.28 * (a * x + b * y)) for a, b in ((1, 2), (3, 1), (2, 5))])
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    shape = (1, 3, 1, 1)
    return (torch.stack([waves, noise]) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def fixed_texts(clip: nn.Module) -> Tensor:
    """Two rows of token ids `[2, context]`, with the largest id where the text ends, as CLIP's tokenizer has it."""
    text = getattr(clip, "text", clip)
    context = int(getattr(text, "context_length", None) or clip.context_length)
    vocabulary = int(getattr(text, "vocab_size", None) or text.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary - 2, (2, context), generator=generator)
    tokens[0, context // 2], tokens[1, context - 1] = vocabulary - 1, vocabulary - 1
    tokens[0, context // 2 + 1 :] = 0
    return tokens


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and reduced precision; each submodule's mode is put back."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _embed(model: nn.Module, pictures: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with _evaluating(model):
        return model.image_embedding(pictures.to(device)).float().cpu()


def _embed_state(visual: nn.Module, pictures: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    device = next(visual.parameters()).device
    own = {n.removeprefix("visual."): t.to(device) for n, t in state.items() if n.startswith("visual.")}
    with _evaluating(visual):
        output = torch.func.functional_call(visual, own, (pictures.to(device),))
    output = output[0] if isinstance(output, tuple) else output
    return output.float().cpu()


def _texts(clip: nn.Module, texts: Tensor) -> Tensor:
    device = next(clip.parameters()).device
    with _evaluating(clip):
        return clip.encode_text(texts.to(device), normalize=False).float().cpu()
