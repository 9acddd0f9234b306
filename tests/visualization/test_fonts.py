"""Names in any script are drawn: every character has a shape of its own."""

import warnings

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from visft.visualization import drawing, fonts
from visft.visualization.predictions import draw

NAMES = {
    "latin": "häufig Łódź",
    "cyrillic and greek": "кошка γάτα",
    "arabic": "قطة صغيرة",
    "hebrew": "חתול",
    "hindi": "कुत्ता खिड़की",
    "bengali": "বিড়াল",
    "tamil": "பூனை",
    "thai": "แมว",
    "chinese": "猫和狗",
    "japanese": "ねこ ネコ",
    "korean": "고양이",
    "ethiopic": "ድመት",
    "emoji": "🦊 ♥️",
    "mixed": "猫 cat кот बिल्ली",
    "signs": "$a$ and $b\\frac",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_character_has_a_glyph(name, caplog) -> None:
    """By fontTools, another reader of fonts than the one that chooses."""
    files = [font_manager.findfont(FontProperties(family=[family])) for family in fonts.families(name)]
    glyphs = set().union(*(TTFont(file).getBestCmap() for file in files))
    assert not [c for c in name if ord(c) not in glyphs and not fonts._joins(c)]
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_predictions_are_drawn_under_any_name(name) -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    found = Instances((200, 300), pred_boxes=Boxes([[20, 60, 200, 180]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    drawn = []
    for shown in (name, "\U000f0000" * 3):
        with warnings.catch_warnings():
            # `missing from font`, which the other name is to be.
            warnings.simplefilter("error" if shown == name else "ignore")
            metadata = Metadata(name="names", thing_classes=[shown])
            ((_, panel),) = draw(image, {"detection": found}, ["detection"], metadata)
        drawn.append(panel)
    assert drawn[0].shape == drawn[1].shape and (drawn[0] != drawn[1]).any()


def test_latin_names_stay_with_the_default_font() -> None:
    assert fonts.families("traffic light, café 90%") == ["sans-serif"]
    assert len(fonts.families("猫 cat")) == 2


@pytest.mark.parametrize("name", ["猫 cat बिल्ली", "кошка", "a cat"])
def test_a_line_holds_its_words_and_nothing_else(name) -> None:
    alone, twice = (drawing.line(name, 400, height=40, size=20, right=right) for right in ("", name))
    assert alone.shape == (40, 400, 3) and (alone[:, 200:] == 255).all()
    left, right = (np.flatnonzero((half < 200).any((0, 2))) for half in (twice[:, :200], twice[:, 200:]))
    assert left[0] <= 5 and right[-1] >= 194 and abs(np.ptp(left) - np.ptp(right)) <= 1


def test_a_character_of_no_font_is_told(caplog) -> None:
    assert fonts.families("a \U000f0001") == ["sans-serif"]
    assert "no font has the characters \U000f0001" in caplog.text
