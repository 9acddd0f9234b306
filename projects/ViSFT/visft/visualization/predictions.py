"""Images of what the heads predict, drawn by detectron2's Visualizer."""

import functools
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from visft.data import ImageError
from visft.data.datasets.captions import captions_of
from visft.data.headers import ImageRules
from visft.data.loader import load_records
from visft.modeling.heads import Caption
from visft.modeling.open_vocabulary import best_of_each
from visft.visualization.drawing import joined, line, save_image, titled, visualizer
from visft.visualization.run_report import WORDS
from visft.visualization.word_maps import draw_word_maps

logger = logging.getLogger(__name__)

THRESHOLD = 0.3
_SMALLEST = 384  # smaller images are enlarged, or the labels would cover them
_LINE, _SIZE = 22, 12  # height of a line of text, and of its letters

_visualizer = functools.partial(visualizer, smallest=_SMALLEST)


def draw(
    image: np.ndarray, output: dict, heads: Sequence[str], metadata, *, threshold: float = THRESHOLD
) -> list[tuple[str, np.ndarray]]:
    """A name and a panel for each head: the image with the instances that score at least `threshold`.

    Without such heads the result is the image alone.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        output: the model's, `{"detection": Instances, ...}` in the image's own coordinates.
        heads: names of heads; those that give instances are drawn.
        metadata: of the data set, with the class names.
    """
    panels = []
    for head in heads:
        found = output.get(head)
        if isinstance(found, Instances):
            found = found.to("cpu")
            found = found[found.scores >= threshold]
            if found.has("proposals"):
                found = best_of_each(found)
            panels.append(
                (
                    head,
                    _visualizer(image, metadata).draw_instance_predictions(found).get_image(),
                )
            )
    return panels or [("image", _visualizer(image, metadata).get_output().get_image())]


def captions_in(output: dict, heads: Sequence[str]) -> dict[str, Caption]:
    """The captions by head."""
    return {head: output[head] for head in heads if isinstance(output.get(head), Caption)}


def draw_ground_truth(image: np.ndarray, record: dict, metadata) -> np.ndarray:
    """An image `[H, W, 3]` with the annotations of its detectron2 data set record."""
    return _visualizer(image, metadata).draw_dataset_dict(record).get_image()


def beside(panels: Sequence[tuple[str, np.ndarray]], captions: Sequence[tuple[str, str]] = ()) -> Image.Image:
    """Panels side by side, each under its name, and captions below, each after its name."""
    above = joined([titled(panel, name, height=_LINE, size=_SIZE) for name, panel in panels], axis=1, gap=4)
    width = above.shape[1]
    rows = [row for name, text in captions for row in _lines(f"{name}: {text}", width)]
    lines = [line(row, width, height=_LINE, size=_SIZE) for row in rows]
    return Image.fromarray(joined([above, *lines], axis=0, gap=0))


def _lines(text: str, width: int) -> list[str]:
    """A text in lines of about `width` pixels."""
    letter = _SIZE * (0.55 if text.isascii() else 0.9)
    return textwrap.wrap(text, max(20, int((width - 8) / letter)), subsequent_indent="    ")


def save_word_maps(image: np.ndarray, captions: dict[str, Caption], path: Path) -> list[Path]:
    """Write the word maps of each caption beside `path`; returns the files."""
    files = []
    for number, caption in enumerate(caption for caption in captions.values() if caption.words):
        file = path.with_name(f"{path.stem}{WORDS}{number or ''}.png")
        files.append(save_image(draw_word_maps(image, caption), file))
    return files


@torch.no_grad()
def draw_predictions(
    model: nn.Module,
    mapper,
    data_set: str,
    folder: Path,
    *,
    heads: Sequence[str],
    classes: Metadata,
    count: int = 8,
) -> None:
    """Write `folder/<image>.png` for `count` images of a data set: ground truth beside each head's prediction; with
    a caption head also `folder/<image>_words.png`. `classes` name what is predicted."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = captions_of(data_set)
    # The evaluation has already named images that cannot be read.
    records = load_records((data_set,), train=False, rules=ImageRules(mapper.max_pixels, skip_broken=True))
    metadata = MetadataCatalog.get(data_set)
    was_training = model.training
    model.eval()
    # The data set may be sorted, so images are taken at even steps.
    step = max(1, len(records) // count)
    for record in records[::step][:count]:
        try:
            image = mapper.read(record)
        except ImageError as error:
            logger.warning("not drawn: %s", error)
            continue
        output = model([mapper(dict(record))])[0]
        panels = [("ground truth", draw_ground_truth(image, record, metadata))]
        panels += draw(image, output, heads, classes)
        captions = captions_in(output, heads)
        path = folder / f"{Path(record['file_name']).stem}.png"
        known = [("ground truth", text) for text in truth.get(record.get("image_id"), ())] if captions else []
        save_image(beside(panels, [*captions.items(), *known]), path)
        save_word_maps(image, captions, path)
    model.train(was_training)
