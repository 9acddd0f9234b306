"""Images of where a caption head looked at each word."""

import numpy as np
from PIL import Image

from visft.modeling.heads import Caption
from visft.visualization.drawing import joined, titled

_SIDE = 160  # longer side of a panel
_LINE, _SIZE = 18, 12  # height of a line of text, and of its letters
_COLUMNS = 6
_DARKEST = 0.2  # brightness of what was not looked at


def draw_word_maps(image: np.ndarray, caption: Caption) -> Image.Image:
    """The image, and a panel for each word: the image as bright as the head's attention was at that word.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        caption: a caption head's, for this image.
    """
    scale = _SIDE / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    light = _DARKEST + (1 - _DARKEST) * caption.word_maps(height, width).numpy()[..., None]
    panels = [
        titled(panel.round().astype(np.uint8), word, height=_LINE, size=_SIZE)
        for panel, word in zip([small, *(small * light)], ["", *caption.words], strict=True)
    ]
    rows = [joined(panels[i : i + _COLUMNS], axis=1, gap=4) for i in range(0, len(panels), _COLUMNS)]
    return Image.fromarray(joined(rows, axis=0, gap=4))
