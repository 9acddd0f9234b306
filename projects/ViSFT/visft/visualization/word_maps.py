"""Images of where a caption head looked at each word."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from visft.modeling.heads import Caption
from visft.visualization.fonts import shortened, write

_SIDE = 160  # longer side of a panel
_LINE, _SIZE = 16, 12  # height of a line of text, and of its letters
_COLUMNS = 6
_DARKEST = 0.2  # brightness of what was not looked at


def draw_word_maps(image: np.ndarray, caption: Caption) -> Image.Image:
    """A panel for each word, as bright as the head's attention as it said the word; the image itself before them.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        caption: what a caption head says about it.
    """
    scale = _SIDE / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    light = _DARKEST + (1 - _DARKEST) * caption.word_maps(height, width).numpy()[..., None]
    panels = [small, *(small * light)]
    return _sheet([panel.round().astype(np.uint8) for panel in panels], ["", *caption.words])


def _sheet(panels: Sequence[np.ndarray], words: Sequence[str]) -> Image.Image:
    height, width = panels[0].shape[:2]
    rows = -(-len(panels) // _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    sheet = Image.new("RGB", (columns * (width + 4) - 4, rows * (height + _LINE + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (panel, word) in enumerate(zip(panels, words, strict=True)):
        x, y = (number % _COLUMNS) * (width + 4), (number // _COLUMNS) * (height + _LINE + 4)
        write(pen, (x + 2, y), shortened(word, width, _SIZE), size=_SIZE)
        sheet.paste(Image.fromarray(panel), (x, y + _LINE))
    return sheet
