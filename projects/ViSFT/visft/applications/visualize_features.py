"""`tools/visualize_features.py`: towers' features of the user's own images, before and after tuning."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from visft.applications import compared_towers
from visft.applications.predict import find_images
from visft.data import read_rgb
from visft.errors import ConfigError, DataError
from visft.modeling.backbone import CLIPViT, open_clip_models
from visft.modeling.backbone.class_embeddings import check_prompts
from visft.modeling.backbone.text_encoder import TextTower
from visft.utils.output_names import output_names
from visft.visualization import (
    Components,
    colours,
    drawing,
    mutual_matches,
    principal_components,
    similarity_maps,
    value_range,
)

logger = logging.getLogger(__name__)

NATIVE_SIDES = 2
"""Default longer side of an image for the tower, in native sides."""

MATCHES = 40
"""Lines between two images."""

_PANEL = 320
"""Shorter side of a panel in pixels, at least."""


@dataclass(frozen=True)
class Seen:
    """One image as a tower sees it.

    Args:
        features: `[h, w, C]`, after the last norm.
        patches: `[h, w, D]`, unit length, in the space of texts; None if there are no texts.
    """

    features: torch.Tensor
    patches: torch.Tensor | None


def run(args: argparse.Namespace) -> list[Path]:
    """Check, encode, draw; returns the files written.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong; raised before anything is written.
    """
    texts = _texts(args.texts)
    check_prompts("--templates", args.templates)
    patch, native = _check_towers(args)
    side = _side(args.side, patch, native)
    paths = list({path.resolve(): path for path in find_images(args.input)}.values())
    output = Path(args.output)
    names = output_names(paths)
    _check_output(output, paths, [f"{name}_{kind}.png" for name in names for kind in ("features", "texts")])
    images = {path: _sized(_read(path), side, patch) for path in paths}
    labels = ["base", *compared_towers.labels(args.compare)]
    seen, embeddings = {}, {}
    for label, pretrained in zip(labels, [args.pretrained, *args.compare], strict=True):
        tower = CLIPViT.from_open_clip(args.model, pretrained).eval()
        tower.to("cuda" if torch.cuda.is_available() else "cpu")
        seen[label] = [see(tower, image, patches=bool(texts)) for image in images.values()]
        if texts:
            embeddings[label] = text_embeddings(tower, texts, args.templates)
        del tower
    components = principal_components(
        [torch.cat([s.features.flatten(0, 1) for s in of]) for of in seen.values()]
    )
    shown = [_panel(image) for image in images.values()]
    sheets = {}
    for number, (name, image) in enumerate(zip(names, shown, strict=True)):
        here = {label: of[number] for label, of in seen.items()}
        sheets[f"{name}_features.png"] = feature_sheet(image, here, components)
        if texts:
            sheets[f"{name}_texts.png"] = text_sheet(image, here, texts, embeddings)
    if len(shown) > 1:
        sheets["matches.png"] = match_sheet(shown[:2], {label: of[:2] for label, of in seen.items()})
    written = [drawing.save_image(sheet, output / name) for name, sheet in sheets.items()]
    for path in written:
        logger.info("%s", path)
    return written


@torch.no_grad()
def see(tower: CLIPViT, image: np.ndarray, *, patches: bool) -> Seen:
    """The features of an image `[H, W, 3]` uint8 whose sides are multiples of the patch."""
    device = next(tower.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (tower.mean, tower.std))
    pixels = (torch.from_numpy(image.copy()).to(device).float() / 255 - mean) / std
    maps, _ = tower.map_and_embedding(pixels.permute(2, 0, 1)[None])
    features = maps[0].permute(1, 2, 0).float().cpu()
    return Seen(features, tower.patch_embeddings(features).cpu() if patches else None)


def text_embeddings(tower: CLIPViT, texts: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """`[len(texts), D]`: the mean over templates, of unit length (CLIP, section 3.1.4)."""
    lines, text = [template.replace("{}", text) for template in templates for text in texts], TextTower(tower)
    embeddings = text(text.tokens(lines, next(tower.parameters()).device)).cpu()
    return F.normalize(embeddings.view(len(templates), len(texts), -1).mean(0), dim=-1)


def feature_sheet(image: np.ndarray, seen: dict[str, Seen], components: Components) -> Image.Image:
    """The image, and the features of each tower as colours."""
    panels = [
        drawing.colour_panel(colours(each.features, components), *image.shape[:2]) for each in seen.values()
    ]
    return drawing.sheet([("", [image, *panels])], ["image", *seen])


def text_sheet(
    image: np.ndarray, seen: dict[str, Seen], texts: Sequence[str], embeddings: dict[str, torch.Tensor]
) -> Image.Image:
    """A row for each text: the image, and each tower's map, all on one colour scale."""
    maps = {label: similarity_maps(each.patches, embeddings[label]) for label, each in seen.items()}
    rows = []
    for number, text in enumerate(texts):
        limits = value_range([each[number] for each in maps.values()])
        panels = [drawing.similarity_panel(image, each[number], limits) for each in maps.values()]
        bar = drawing.colour_bar(limits, image.shape[1])
        rows.append((text, [np.concatenate((image, bar)), *panels]))
    return drawing.sheet(rows, ["image", *seen])


def match_sheet(images: Sequence[np.ndarray], seen: dict[str, Sequence[Seen]]) -> Image.Image:
    """Matches between two images, a panel for each tower."""
    panels = []
    for pair in seen.values():
        pairs, _ = mutual_matches(*(each.features.flatten(0, 1) for each in pair), MATCHES)
        panels.append(drawing.match_panel(*images, pairs, [tuple(each.features.shape[:2]) for each in pair]))
    return drawing.sheet([("", panels)], list(seen))


def _texts(given: str | None) -> list[str]:
    texts = list(dict.fromkeys(text.strip() for text in (given or "").split(",") if text.strip()))
    if given is not None and not texts:
        raise ConfigError(f"--texts '{given}': no text was found; give some by commas, as \"a cat, grass\"")
    return texts


def _check_towers(args: argparse.Namespace) -> tuple[int, int]:
    """The patch and the native side of the architecture, in pixels."""
    compared_towers.check(args.model, args.pretrained, args.compare)
    with compared_towers.said_of("--model"):
        backbone = CLIPViT(open_clip_models.meta_tower(args.model))
    return backbone.stride, max(backbone.image_size)


def _side(given: int | None, patch: int, native: int) -> int:
    if given is None:
        return max(1, round(NATIVE_SIDES * native / patch)) * patch
    if given < 2 * patch or given % patch:
        near = max(2, round(given / patch)) * patch
        raise ConfigError(
            f"--side {given}: a multiple of the patch, {patch}, and two of them at least, was expected; give {near}"
        )
    return given


def _check_output(output: Path, inputs: Sequence[Path], names: Sequence[str]) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is a file, a folder was expected; give another name")
    there = {path.resolve() for path in inputs}
    for name in (*names, "matches.png"):
        if (output / name).resolve() in there:
            raise ConfigError(
                f"--output {output}: {name} would replace an image of --input; give another folder"
            )


def _read(path: Path) -> np.ndarray:
    try:
        return read_rgb(path, max_pixels=0)  # the user names the file
    except DataError as error:
        raise DataError(f"--input {error}") from error


def _sized(image: np.ndarray, side: int, patch: int) -> np.ndarray:
    """An image with the longer side `side` and the shorter one rounded to whole patches."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale / patch)) * patch for length in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _panel(image: np.ndarray) -> np.ndarray:
    scale = max(1.0, _PANEL / min(image.shape[:2]))
    return drawing.enlarged(image, *(round(length * scale) for length in image.shape[:2]))
