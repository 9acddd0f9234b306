"""Reading words: typefaces, words, CTC, exact features at the top and those of other words at the bottom."""

import numpy as np
import torch

from visft.backbone import open_clip_zoo
from visft.evaluation.benchmarks import Context, suite
from visft.evaluation.benchmarks.demo import ocr


def test_typefaces_are_there_and_those_of_the_test_are_not_trained_on():
    train, test = ocr.font_files(ocr.TRAIN_FONTS), ocr.font_files(ocr.TEST_FONTS)
    assert len(train) >= 20 and len(test) >= 10 and not set(train.values()) & set(test.values())
    assert ocr.OcrWords.missing(Context()) is None
    found = {part: set(words) for part, words in ocr.words().items()}
    assert all(len(words) > 60 for words in found.values())
    assert not found["train"] & found["test"] and not found["test"] & found["development"]


def test_pictures_show_the_words_and_are_the_same_every_time():
    files = ocr.font_files(ocr.TRAIN_FONTS) | ocr.font_files(ocr.TEST_FONTS)
    for face in files:  # every face has every letter: no two look alike
        looks = [ocr.picture([(c * 3, face)], files, np.random.default_rng(0)).tobytes() for c in ocr.LETTERS]
        assert len(set(looks)) == 26, face
    first, again = (list(ocr._pictures("validation").make()) for _ in range(2))
    assert np.array_equal(first, again) and np.shape(first) == (75, 128, 128, 3)


def test_edit_distance_and_spelling_by_hand():
    assert ocr.edit_distance("kitten", "sitting") == 3 and ocr.edit_distance("", "ab") == 2
    scores = ocr.accuracies(["cat", "cut", ""], ["cat", "cat", "cat"])
    assert np.allclose(scores, [[1, 1], [0, 2 / 3], [0, 0]])
    path = torch.eye(27)[[3, 3, 0, 1, 20, 20, 0, 20]][:, None]
    assert ocr.spelled(path) == ["catt"]
    letters, lengths = ocr.encoded(["cat", "b"])
    assert letters.tolist() == [3, 1, 20, 2] and lengths.tolist() == [3, 1]


def columns(words, rng):
    """Columns `[N, 26 + 2, 16]` that tell the letter: each is two columns wide, from any place on."""
    found = np.zeros((len(words), 28, 16), np.float32)
    for row, word in zip(found, words, strict=True):
        start = rng.integers(0, 17 - 2 * len(word))
        for place, c in enumerate(word):
            row[ocr.LETTERS.index(c), start + 2 * place : start + 2 * place + 2] = 5
    return torch.from_numpy(found + 0.1 * rng.standard_normal(found.shape).astype(np.float32))


def test_exact_features_are_read_and_those_of_other_words_are_not(monkeypatch):
    monkeypatch.setattr(ocr, "WEIGHT_DECAYS", (0.01,))
    rng = np.random.default_rng(0)
    train = ["".join(rng.choice(list(ocr.LETTERS), rng.integers(3, 8))) for _ in range(900)]
    test = list(ocr.words()["test"])[:60]
    sides = (columns(train, rng), train), (columns(test, rng), test)
    reader = ocr.trained(*sides, 0, epochs=20)
    seen = columns(test, rng)
    with torch.no_grad():
        word, character = ocr.accuracies(ocr.spelled(reader(seen)), test).mean(0)
        other = ocr.accuracies(ocr.spelled(reader(seen.roll(7, 0))), test).mean(0)
    assert word > 0.9 and character > 0.97
    assert other[0] < 0.05 and other[1] < 0.4
    few = [(found[:64], words[:64]) for found, words in sides]
    first, again = (ocr.trained(*few, 0, epochs=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_tower_against_itself_has_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "COUNTS", {"train": 24, "validation": 8, "test": 12, "development": 8})
    monkeypatch.setattr(ocr, "EPOCHS", 2)
    ocr.lines.cache_clear()
    entries = [suite.Entry("base", "demo"), suite.Entry("same", str(open_clip_zoo.TINY_WEIGHTS))]
    results = suite.run(open_clip_zoo.TINY, entries, (ocr.OcrWords,), Context(), seeds=1, output=tmp_path)
    ocr.lines.cache_clear()
    (row,) = results["families"]
    assert row["name"] == "ocr" and row["n"] == 12
    assert row["difference"] == row["low"] == row["high"] == 0 and row["verdict"] == "not shown"
