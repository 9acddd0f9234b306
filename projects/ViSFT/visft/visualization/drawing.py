"""Panels (images with instances, feature maps, lines of text) and sheets of panels."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from visft.checkpoint.files import write_aside
from visft.visualization.fonts import families

Panel = np.ndarray
"""`[H, W, 3]` uint8 RGB."""

COLOUR_MAP = "viridis"
"""Its lightness rises evenly, so it also works without colour vision."""

RIGHT, WRONG = (0, 114, 178), (213, 94, 0)
"""Blue and vermilion, which colour-blind people can tell apart."""

GAP, _TITLE, _ROW_TITLE = 8, 30, 22
_MAP = 0.65
"""Opacity of a map over an image."""


@functools.cache
def _visualizer_class() -> type:
    from detectron2.utils.visualizer import Visualizer  # imports cv2, of the extra `demo`

    class AnyNames(Visualizer):
        """Draws names in any script on one line. A name with two dollar signs is not a formula."""

        def draw_text(self, text, position, **options):
            text = " ".join(text.split())
            output = super().draw_text(text, position, **options)
            output.ax.texts[-1].set(family=families(text), parse_math=False)
            return output

    return AnyNames


def visualizer(image: np.ndarray, metadata=None, *, smallest: int = 0):
    """detectron2's Visualizer of an image `[H, W, 3]` uint8, enlarged to a shorter side of at least `smallest`."""
    return _visualizer_class()(image, metadata, scale=max(1.0, smallest / min(image.shape[:2])))


def enlarged(image: np.ndarray, height: int, width: int) -> Panel:
    """An image `[H, W, 3]` uint8 of another size."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def colour_panel(colours: torch.Tensor, height: int, width: int) -> Panel:
    """Colours `[h, w, 3]` in 0..1 as one flat square per patch."""
    small = (colours * 255).round().to(torch.uint8).numpy()
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def similarity_panel(image: np.ndarray, cosines: torch.Tensor, limits: tuple[float, float]) -> Panel:
    """A map of cosines `[h, w]` in colours over the grey image.

    Args:
        image: `[H, W, 3]` uint8, of the panel's size.
        limits: cosines at the ends of the colour map.
    """
    wide = F.interpolate(cosines[None, None], image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    heat = _heat((wide.numpy() - limits[0]) / (limits[1] - limits[0]))
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return ((1 - _MAP) * grey + _MAP * heat).round().astype(np.uint8)


def colour_bar(limits: tuple[float, float], width: int) -> Panel:
    """The colour map with the values at its ends."""
    bar = _heat(np.tile(np.linspace(0, 1, width), (10, 1))).round().astype(np.uint8)
    low, high = (f"{limit:.2f}" for limit in limits)
    return joined([bar, line(low, width, height=22, size=14, right=high)], axis=0, gap=0)


def _heat(values: np.ndarray) -> np.ndarray:
    return colormaps[COLOUR_MAP](np.clip(values, 0, 1))[..., :3].astype(np.float32) * 255


def named_masks(
    image: np.ndarray, masks: Sequence[np.ndarray], names: Sequence[str], right: Sequence[bool]
) -> Panel:
    """Masks with their predicted names, blue where the name is right and vermilion where it is wrong.

    Args:
        image: `[H, W, 3]` uint8.
        masks: `[h, w]` bool each, of the same scene, at any size.
    """
    size = image.shape[1::-1]
    large = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    labels = [f"{'✓' if good else '✗'} {name}" for name, good in zip(names, right, strict=True)]
    colours = [np.array(RIGHT if good else WRONG) / 255 for good in right]
    drawn = visualizer(image).overlay_instances(
        masks=large, labels=labels, assigned_colors=colours, alpha=0.35
    )
    for text in drawn.ax.texts:  # in colour on black, blue can hardly be read
        text.set_color("white")
        background = RIGHT if text.get_text().startswith("✓") else WRONG
        text.get_bbox_patch().set_facecolor(np.array(background) / 255)
    return drawn.get_image()


def match_panel(
    first: np.ndarray, second: np.ndarray, pairs: torch.Tensor, grids: Sequence[tuple[int, int]]
) -> Panel:
    """Two images side by side, and a line from each patch to its match.

    Args:
        first, second: `[H, W, 3]` uint8.
        pairs: `[K, 2]`, indices of patches in row-major order.
        grids: `(rows, columns)` of patches of each image.
    """
    shift = first.shape[1] + GAP
    sheet = Image.fromarray(joined([first, second], axis=1, gap=GAP))
    pen = ImageDraw.Draw(sheet)
    for number, (a, b) in enumerate(pairs.tolist()):
        # Neighbouring lines differ in colour.
        colour = tuple(int(255 * value) for value in colormaps["tab20"].colors[number % 20])
        ends = _centre(a, grids[0], first), _centre(b, grids[1], second)
        ends = ends[0], (ends[1][0] + shift, ends[1][1])
        pen.line(ends, fill=colour, width=2)
        for x, y in ends:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline="white")
    return np.asarray(sheet)


def _centre(patch: int, grid: tuple[int, int], image: np.ndarray) -> tuple[float, float]:
    row, column = divmod(patch, grid[1])
    return (column + 0.5) * image.shape[1] / grid[1], (row + 0.5) * image.shape[0] / grid[0]


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG aside and rename it; returns its path."""
    with write_aside(path) as partial:
        image.save(partial, format="PNG")
    return path


def joined(panels: Sequence[Panel], *, axis: int, gap: int) -> Panel:
    """Panels on white with `gap` pixels between them: below each other (axis 0), or side by side (axis 1)."""
    length = max(panel.shape[1 - axis] for panel in panels)
    parts = []
    for number, panel in enumerate(panels):
        space = [(0, 0)] * 3
        space[axis] = (gap if number else 0, 0)
        space[1 - axis] = (0, length - panel.shape[1 - axis])
        parts.append(np.pad(panel, space, constant_values=255))
    return np.concatenate(parts, axis)


def line(text: str, width: int, *, height: int, size: int, right: str = "") -> Panel:
    """A line of text on white, cut where it does not fit. `right` is further text at the right end."""
    figure = Figure(figsize=((width + 0.01) / 72, (height + 0.01) / 72), dpi=72)
    for words, place, side in ((text, 2, "left"), (right, width - 2, "right")):
        words = " ".join(words.split())
        style = {"family": families(words), "size": size, "parse_math": False}
        figure.text(place / width, 0.5, words, ha=side, va="center_baseline", **style)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def titled(panel: Panel, text: str, *, height: int, size: int) -> Panel:
    """A panel under a line of text."""
    return joined([line(text, panel.shape[1], height=height, size=size), panel], axis=0, gap=0)


def sheet(rows: Sequence[tuple[str, Sequence[Panel]]], titles: Sequence[str] = ()) -> Image.Image:
    """Rows of panels, each row under its own title, columns under theirs.

    Args:
        rows: a title (may be empty) and panels each. The panels of a column have one width.
        titles: of the columns.
    """
    widths = [panel.shape[1] for panel in rows[0][1]]
    heads = [line(title, width, height=_TITLE, size=16) for title, width in zip(titles, widths, strict=False)]
    parts = [joined(heads, axis=1, gap=GAP)] if any(titles) else []
    for title, panels in rows:
        together = joined(panels, axis=1, gap=GAP)
        if title:
            together = titled(together, title, height=_ROW_TITLE, size=14)
        parts.append(np.pad(together, ((0, GAP), (0, 0), (0, 0)), constant_values=255))
    top = 0 if any(titles) else GAP
    return Image.fromarray(
        np.pad(joined(parts, axis=0, gap=0), ((top, 0), (GAP, GAP), (0, 0)), constant_values=255)
    )
