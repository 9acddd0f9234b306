"""Reading words: typefaces, words, images of them; how they are read is tested beside `ctc_readout`."""

import numpy as np

from towerbench import Context
from towerbench.demo import ocr


def test_typefaces_are_there_and_those_of_the_test_are_not_trained_on():
    train, test = ocr.font_files(ocr.TRAIN_FONTS), ocr.font_files(ocr.TEST_FONTS)
    assert len(train) >= 20 and len(test) >= 10 and not set(train.values()) & set(test.values())
    assert ocr.OcrWords.missing(Context()) is None
    found = {part: set(words) for part, words in ocr.words().items()}
    assert all(len(words) > 60 for words in found.values())
    assert not found["train"] & found["test"] and not found["test"] & found["development"]


def test_images_show_the_words_and_are_the_same_every_time():
    files = ocr.font_files(ocr.TRAIN_FONTS) | ocr.font_files(ocr.TEST_FONTS)
    for face in files:  # every face has every letter: no two look alike
        looks = [ocr.drawn([(c * 3, face)], files, np.random.default_rng(0)).tobytes() for c in ocr.LETTERS]
        assert len(set(looks)) == 26, face
    first, again = (list(ocr._images("validation").make()) for _ in range(2))
    assert np.array_equal(first, again) and np.shape(first) == (75, 128, 128, 3)


def test_a_tower_against_itself_has_the_same_figures(against_itself, monkeypatch):
    monkeypatch.setattr(ocr, "COUNTS", {"train": 24, "validation": 8, "test": 12, "development": 8})
    monkeypatch.setattr(ocr, "EPOCHS", 2)
    ocr.lines.cache_clear()
    (row,) = against_itself(ocr.OcrWords)["families"]
    ocr.lines.cache_clear()
    assert row["name"] == "ocr" and row["n"] == 12
