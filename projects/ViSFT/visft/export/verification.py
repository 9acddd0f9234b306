"""Checks of a written export: it is read back tensor by tensor, and run by its library in a fresh process."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from visft.checkpoint import stream
from visft.checkpoint.files import Lazy, parts, write_json, write_safetensors
from visft.errors import CheckpointError, ExportError

logger = logging.getLogger(__name__)

READER = Path(__file__).with_name("reader.py")
PHOTOGRAPHS = tuple(sorted((Path(__file__).parent / "pictures").glob("*.jpg")))

TOLERANCE = 2e-5
"""Largest distance of embeddings, relative to their length. It is several times the rounding of merged LoRA in float32
(5e-7 to 3e-6 on towers of 3 to 24 blocks), and far below the effect of a wrong weight."""

LOW_PRECISION_TOLERANCE = 3e-2
"""The same for a model that computes with 16-bit weights, while the export holds them in 32 bits."""

EXACT, SIMILAR = 1e-6, 2e-3
"""Largest mean difference of normalised pixels from open_clip's: by the same resizing of Pillow, and by that of another
library (under 1e-4 by torchvision's; a grey level, 1/255, is 1.5e-2 after normalising)."""


@dataclass(frozen=True)
class Check:
    """The result of a check: name and version of the reader, and the largest distance of what it computes."""

    version: str
    distance: float
    what: str

    @property
    def phrase(self) -> str:
        """The check as a phrase for the card."""
        return f"{self.version}, in a process without visft: largest relative distance {self.distance:.1e} {self.what}"

    def log(self, path: Path) -> None:
        """Log that the export is written."""
        logger.info(
            "wrote %s: read by %s in a process of its own, largest relative distance %.1e %s",
            path,
            self.version,
            self.distance,
            self.what,
        )


def stored(path: Path, tensors: Mapping[str, Tensor | Lazy]) -> None:
    """Raise ExportError unless a file holds exactly these tensors. They are compared in parts."""
    try:
        file = stream.TensorFile(path)
    except CheckpointError as error:
        raise ExportError(f"What was just written does not read back: {error}") from error
    if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from the cache of the system
        with open(path, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    wrong = [name for name in sorted(tensors) if not _holds(file, name, tensors[name])]
    wrong += sorted(file.mapped.keys() - tensors.keys())
    if wrong:
        raise ExportError(
            f"{path.name}: {len(wrong)} tensors read back otherwise than written ({', '.join(wrong[:3])}); is the disk "
            "sound?"
        )


def _holds(file: stream.TensorFile, name: str, tensor: Tensor | Lazy) -> bool:
    if name not in file.mapped or file.mapped[name].dtype != tensor.dtype:
        return False
    if file.mapped[name].shape != tensor.shape:
        return False
    found, there = file.parts(name), None
    for part in parts(tensor):
        while len(part):  # the two are cut into different parts
            there = next(found) if there is None else there
            count = min(len(there), len(part))
            if not torch.equal(there[:count].view(torch.uint8), part[:count].view(torch.uint8)):
                return False
            there, part = there[count:] if count < len(there) else None, part[count:]
        del part  # before the next part, so that its mapping is released
    return True


def run(
    reader: str,
    path: Path,
    embed: Callable[[Tensor], Tensor],
    preprocess: Mapping[str, Any],
    *,
    clip: nn.Module | None = None,
    task: Mapping[str, Any] | None = None,
    pixels: float | None = None,
) -> Check:
    """Let a reader, in a process without visft, embed three photographs and texts, and compare.

    Args:
        reader: of `reader.py`.
        path: the file that it loads, perhaps with others in its folder.
        embed: normalised images `[N, 3, h, w]` to the embeddings `[N, D]` that it must find.
        preprocess: `size`, `mean`, `std`, `interpolation`, `resize_mode`.
        clip: embeds the texts. None: the reader has no text encoder.
        task: what else the reader needs.
        pixels: the tolerance of images that the reader prepares from the photographs by the export's own
            preprocessing. None: it prepares none.

    Raises:
        ExportError: the file does not load, or an embedding, an image or the tokens of a text differ.
    """
    images = photographs(preprocess)
    given, expected = {"pictures": images}, {"images": embed(images)}
    if clip is not None:
        given["texts"] = fixed_texts(clip)
        expected["texts"] = _texts(clip, given["texts"])
    found, version = ask(reader, path, given, task or {})
    distances = [
        compare(part, found[part], want, TOLERANCE)
        for kind, want in expected.items()
        for part in [kind, *(name for name in found if name.startswith(f"{kind} "))]
    ]
    if pixels is not None:
        _compare_pixels(found["pixels"], images, pixels)
    if "tokens" in found:
        _compare_tokens(found["tokens"], task["tokens"])
    texts = " and 2 texts" if clip is not None else ""
    return Check(version, max(distances), f"between embeddings of {len(images)} photographs{texts}")


def run_updates(path: Path, updates: Mapping[str, Tensor], task: Mapping[str, Any]) -> Check:
    """Compute the dense updates of a LoRA file in a process without visft, and compare.

    Args:
        updates: `<block>.<projection>` to the dense update `[out, in]` that it must find; others must be zero.
        task: `layout` and `scaling`, see `reader.lora`.

    Raises:
        ExportError: the file cannot be read, or an update differs.
    """
    found, version = ask("lora", path, {}, task)
    distance = 0.0
    for name in sorted(found.keys() | updates.keys()):
        got, want = found.get(name), updates.get(name)
        if got is None or (want is None and got.any()):
            raise ExportError(f"{path.name}: the update of {name} is in one of file and model alone.")
        if want is not None:
            scale = want.norm().clamp_min(torch.finfo(torch.float32).tiny)
            distance = max(distance, ((got - want).norm() / scale).item())
    if not distance <= TOLERANCE:
        raise ExportError(
            f"{path.name}: holds other updates than the model, by {distance:.1e} of their size."
        )
    return Check(version, distance, f"between {len(updates)} updates B A")


def compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the largest relative distance between rows of embeddings `[N, D]`.

    Raises:
        ExportError: it is above the tolerance or not a number.
    """
    if found.shape != expected.shape:
        raise ExportError(f"The reader's {what} are {list(found.shape)}, expected {list(expected.shape)}.")
    distance = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not distance <= tolerance:
        raise ExportError(
            f"The reader computes other embeddings of {what} than the model: relative distance {distance:.1e}, allowed "
            f"{tolerance:.0e}; nothing was exported."
        )
    return distance


def _compare_pixels(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare images. A shift by one pixel is allowed, because libraries round the corner of a crop differently."""
    distance = float("inf")
    if found.shape == expected.shape:
        inner = expected[:, :, 1:-1, 1:-1]
        places = range(3) if tolerance > EXACT else (1,)
        height, width = inner.shape[2:]
        distance = sum(
            min(
                (found[i, :, y : y + height, x : x + width] - inner[i]).abs().mean().item()
                for y in places
                for x in places
            )
            for i in range(len(inner))
        ) / len(inner)
    if not distance <= tolerance:
        raise ExportError(
            f"The reader prepares images otherwise than the model's own library: mean difference {distance:.1e} of "
            f"normalised pixels {list(found.shape)}, allowed {tolerance:.0e}; nothing was exported."
        )


def _compare_tokens(found: Tensor, expected: list[list[int]]) -> None:
    """Compare tokens up to the end of the text, which has the largest id. Padding does not matter."""
    for got, want in zip(found.long().tolist(), expected, strict=True):
        length = want.index(max(want)) + 1
        if got[:length] != want[:length]:
            raise ExportError(
                "The reader's tokenizer gives other tokens than the base's; nothing was exported."
            )


def ask(
    reader: str, path: Path, given: Mapping[str, Tensor], task: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str]:
    """Return what a reader computes from a file, by name, and its version. Arguments as in `run`.

    Raises:
        ExportError: the file does not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.tensors" for name in ("given", "found")}
        write_safetensors(files["given"], given)
        paths = {**files, "folder": path.parent.absolute(), "file": path.absolute()}
        known = {"reader": reader, "photographs": [str(file) for file in PHOTOGRAPHS]}
        known |= {name: str(file) for name, file in paths.items()}
        write_json(Path(folder) / "task.json", {**task, **known})
        version = read(reader, Path(folder) / "task.json")
        return load_file(files["found"]), version


def read(reader: str, task: Path) -> str:
    """Run `reader.py` in a fresh process without this package, and return the JSON that it prints.

    Raises:
        ExportError: it fails. The message has its last line.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p and not (Path(p) / "visft").is_dir()),
        "HF_HUB_OFFLINE": "1",  # all it needs is there
    }
    # Given as text, because Python searches the folder of a script for modules.
    command = [sys.executable, "-c", READER.read_text(encoding="utf-8") + _ALONE, str(task)]
    result = subprocess.run(
        command, env=environment, cwd=task.parent, capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise ExportError(f"{reader} does not load the export: {lines[-1][:300]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


_ALONE = """
import sys
if "visft" in sys.modules:
    raise SystemExit("visft was imported: this process would not show what a user without it sees")
"""


def photographs(preprocess: Mapping[str, Any]) -> Tensor:
    """Return the three photographs as open_clip prepares them, normalised, `[3, 3, h, w]`."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    size = tuple(preprocess["size"])
    size = size[0] if size[0] == size[1] else size
    transform = image_transform_v2(PreprocessCfg(**{**preprocess, "size": size}), is_train=False)
    images = []
    for file in PHOTOGRAPHS:
        with Image.open(file) as image:
            images.append(transform(image))
    return torch.stack(images)


def fixed_texts(clip: nn.Module) -> Tensor:
    """Return two rows of token ids `[2, context]`. The largest id ends the text, as with CLIP's tokenizer."""
    text = getattr(clip, "text", clip)
    context = int(getattr(text, "context_length", None) or clip.context_length)
    vocabulary = int(getattr(text, "vocab_size", None) or text.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary - 2, (2, context), generator=generator)
    tokens[0, context // 2], tokens[1, context - 1] = vocabulary - 1, vocabulary - 1
    tokens[0, context // 2 + 1 :] = 0
    return tokens


def embed(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return the embeddings of a CLIPViT, float32 `[N, D]` on the CPU. The mode of the model does not change."""
    device = next(model.parameters()).device
    with _evaluating(model, device):
        return model.image_embedding(pictures.to(device)).float().cpu()


def embed_state(visual: nn.Module, pictures: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings that a tower's own forward pass computes with other weights. The tower keeps its own."""
    device = next(visual.parameters()).device
    own = {name: tensor.to(device) for name, tensor in state.items()}
    with _evaluating(visual, device):
        output = torch.func.functional_call(visual, own, (pictures.to(device),))
    output = output[0] if isinstance(output, tuple) else output
    return output.float().cpu()


def _texts(clip: nn.Module, texts: Tensor) -> Tensor:
    device = next(clip.parameters()).device
    with _evaluating(clip, device):
        return clip.encode_text(texts.to(device), normalize=False).float().cpu()


@contextlib.contextmanager
def _evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a module without gradients and reduced precision, and restore the mode of each submodule."""
    modes = {part: part.training for part in module.modules()}
    precision = torch.get_float32_matmul_precision()
    try:
        module.eval()
        torch.set_float32_matmul_precision("highest")
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for part, mode in modes.items():
            part.training = mode
