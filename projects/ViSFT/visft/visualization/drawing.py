"""Panels of feature maps, and sheets of panels."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from visft.visualization.fonts import font, length, shortened, write

Panel = np.ndarray
"""`[H, W, 3]` uint8 RGB."""

COLOUR_MAP = "viridis"
"""Of even lightness steps, and read alike with and without colour vision."""

RIGHT, WRONG = (0, 114, 178), (213, 94, 0)
"""Blue and vermilion, which people without colour vision tell apart."""

GAP, _TITLE, _ROW_TITLE = 8, 30, 22
_KEPT = 0.35
"""Share of the image that shows through a map."""


def enlarged(image: np.ndarray, height: int, width: int) -> Panel:
    """An image `[H, W, 3]` uint8 of another size."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def colour_panel(colours: torch.Tensor, height: int, width: int) -> Panel:
    """Colours `[h, w, 3]` in 0..1, one flat square a patch."""
    small = (colours * 255).round().to(torch.uint8).numpy()
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def similarity_panel(image: np.ndarray, cosines: torch.Tensor, limits: tuple[float, float]) -> Panel:
    """A map of cosines `[h, w]` in colours over its image in grey.

    Args:
        image: `[H, W, 3]` uint8, already as large as the panel.
        limits: what the ends of the colour map stand for.
    """
    wide = F.interpolate(cosines[None, None], image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    heat = _heat((wide.numpy() - limits[0]) / (limits[1] - limits[0]))
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    return (_KEPT * grey + (1 - _KEPT) * heat).round().astype(np.uint8)


def colour_bar(limits: tuple[float, float], width: int) -> Panel:
    """The colour map with what its ends stand for."""
    bar = _heat(np.tile(np.linspace(0, 1, width), (10, 1))).round().astype(np.uint8)
    sheet = Image.new("RGB", (width, 32), "white")
    sheet.paste(Image.fromarray(bar), (0, 0))
    pen = ImageDraw.Draw(sheet)
    pen.text((0, 12), f"{limits[0]:.2f}", font=font(14), fill="black")
    pen.text((width, 12), f"{limits[1]:.2f}", font=font(14), fill="black", anchor="ra")
    return np.asarray(sheet)


def _heat(values: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps[COLOUR_MAP](np.clip(values, 0, 1))[..., :3].astype(np.float32) * 255


def named_masks(
    image: np.ndarray, masks: Sequence[np.ndarray], names: Sequence[str], right: Sequence[bool]
) -> Panel:
    """Masks with the names that they are given, blue where the name is right and vermilion where it is wrong.

    Args:
        image: `[H, W, 3]` uint8.
        masks: `[h, w]` bool each, of the same scene; they may be smaller.
    """
    height, width = image.shape[:2]
    canvas, labels = image.astype(np.float32), []
    for mask, name, good in zip(masks, names, right, strict=True):
        colour = np.array(RIGHT if good else WRONG, np.float32)
        large = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        canvas[large] = 0.65 * canvas[large] + 0.35 * colour
        canvas[_outline(large, max(1, width // 150))] = colour
        rows, columns = np.nonzero(large)
        if len(rows):
            labels.append(((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2, name, good))
    sheet = Image.fromarray(canvas.round().astype(np.uint8))
    _labels(sheet, labels, max(12, width // 19))
    return np.asarray(sheet)


def _outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels of a mask that lie within `thickness` of its rim."""
    outside = F.pad(torch.from_numpy(~mask)[None, None].float(), [thickness] * 4, value=1.0)
    near = F.max_pool2d(outside, 2 * thickness + 1, 1)[0, 0].numpy() > 0
    return mask & near


def _labels(sheet: Image.Image, labels: Sequence[tuple[float, float, str, bool]], size: int) -> None:
    """Write each label about its place, shifted into the sheet and below those that it would cover."""
    pen, taken = ImageDraw.Draw(sheet), []
    for x, y, name, good in sorted(labels, key=lambda label: label[1]):
        text = f"{'✓' if good else '✗'} {name}"
        width, height = length(text, size) + 8, sum(font(size).getmetrics()) + 4
        x0 = min(max(0, x - width / 2), max(0, sheet.width - width))
        y0 = min(max(0, y - height / 2), sheet.height - height)
        # Down past what is in the way; where the sheet ends, up.
        for step in (1, -1):
            place = y0
            while 0 <= place <= sheet.height - height and _hits(
                taken, (x0, place, x0 + width, place + height)
            ):
                place += step * 4
            if 0 <= place <= sheet.height - height:
                y0 = place
                break
        taken.append((x0, y0, x0 + width, y0 + height))
        pen.rectangle(taken[-1], fill=RIGHT if good else WRONG)
        write(pen, (x0 + 4, y0 + 2), text, size=size, fill="white")


def _hits(boxes: Sequence[tuple], box: tuple) -> bool:
    return any(a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3] for a in boxes)


def match_panel(
    first: np.ndarray, second: np.ndarray, pairs: torch.Tensor, grids: Sequence[tuple[int, int]]
) -> Panel:
    """Two images side by side, and a line from each patch to its match.

    Args:
        first, second: `[H, W, 3]` uint8.
        pairs: `[K, 2]`: numbers of patches, row by row.
        grids: `(rows, columns)` of patches of each image.
    """
    from matplotlib import colormaps

    shift = first.shape[1] + GAP
    sheet = Image.new("RGB", (shift + second.shape[1], max(first.shape[0], second.shape[0])), "white")
    sheet.paste(Image.fromarray(first), (0, 0))
    sheet.paste(Image.fromarray(second), (shift, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (a, b) in enumerate(pairs.tolist()):
        # In turn, so that neighbouring lines are told apart.
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


def sheet(rows: Sequence[tuple[str, Sequence[Panel]]], titles: Sequence[str] = ()) -> Image.Image:
    """Rows of panels, each row under its own title, columns under theirs.

    Args:
        rows: a title (may be empty) and panels each; the panels of a column may differ in size.
        titles: of the columns.
    """
    columns = max(len(panels) for _, panels in rows)
    widths = [max(panels[i].shape[1] for _, panels in rows if i < len(panels)) for i in range(columns)]
    heights = [max(panel.shape[0] for panel in panels) + _ROW_TITLE * bool(title) for title, panels in rows]
    top = _TITLE if any(titles) else GAP
    image = Image.new(
        "RGB", (sum(widths) + GAP * (columns + 1), top + sum(heights) + GAP * len(rows)), "white"
    )
    pen = ImageDraw.Draw(image)
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(columns)]
    for title, x, width in zip(titles, lefts, widths, strict=False):
        write(pen, (x, 6), shortened(title, width, 16), size=16)
    y = top
    for (title, panels), height in zip(rows, heights, strict=True):
        if title:
            write(pen, (GAP, y), shortened(title, image.width - 2 * GAP, 14), size=14)
        for panel, x in zip(panels, lefts, strict=False):
            image.paste(Image.fromarray(panel), (x, y + _ROW_TITLE * bool(title)))
        y += height + GAP
    return image
