"""Captions of scenes by a fresh head: exact features are named, and CIDEr-D by image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle

from demoworld import unseen_things
from towerbench import caption_readout, captions
from towerbench.caption_decoder import CaptionDecoder, Words
from towerbench.demo import captioning, regions, unseen
from visft.evaluation.caption_metrics import caption_scores
from visft.modeling.heads.captioning.beam_search import beam_search
from visft.modeling.heads.captioning.transformer_head import TransformerDecoder
from visft.modeling.heads.captioning.vocabulary import Vocabulary


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Five things, so that few scenes show each of them often."""
    monkeypatch.setattr(unseen_things, "_THINGS", unseen_things._THINGS[:5])
    monkeypatch.setattr(unseen, "COUNTS", {"train": 260, "validation": 30, "test": 50, "development": 20})
    unseen.cast.cache_clear()
    unseen.scenes.cache_clear()
    yield
    unseen.cast.cache_clear()
    unseen.scenes.cache_clear()


def test_captions_of_exact_features_are_better_than_those_of_other_scenes():
    cells = {part: regions.cells(Oracle(), unseen.images(part, dense=True)) for part in unseen.COUNTS}
    texts = {part: [scene.captions for scene in unseen.scenes(part)] for part in unseen.COUNTS}
    sides = ((3 * cells[part], texts[part]) for part in ("train", "validation"))
    captioner = caption_readout.trained(*sides, replace(captioning.RECIPE, batch=16), seed=0)
    truth = dict(enumerate(texts["test"]))

    def score(seen):
        found = captions.cider_by_image(truth, dict(enumerate(captioner.said(3 * seen))))
        return np.mean(list(found.values()))

    exact, other = score(cells["test"]), score(cells["test"].roll(7, 0))
    assert exact > 1.3 * other and exact > 0.3, (exact, other)


def test_cider_by_image_has_the_figure_as_its_mean():
    truth = {7: ["a dog on grass", "the dog"], 3: ["two cats in a box"], 5: ["a red car is here"]}
    told = {3: "two cats in a box", 7: "a dog", 5: "a car is here"}
    by_image = captions.cider_by_image(truth, told)
    assert list(by_image) == [7, 3, 5] and max(by_image, key=by_image.get) == 3
    whole = caption_scores(truth, told, ["CIDEr"])["CIDEr"]
    assert 100 * np.mean(list(by_image.values())) == pytest.approx(whole)


def test_the_same_start_for_every_tower():
    cells, texts = torch.randn(4, 64, 8), [["a dog", "a red dog"]] * 4
    recipe = replace(captioning.RECIPE, epochs=1)
    made = (caption_readout.trained((cells, texts), (cells, texts), recipe, 3) for _ in range(2))
    first, again = (each.decoder.state_dict() for each in made)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_words_are_numbered_as_a_caption_heads():
    texts = ["A man's dog, on_top", "the dog on a hill", "a dog"]
    ours, theirs = Words(texts, 2), Vocabulary.build(texts, 2)
    assert len(ours) == len(theirs)
    for text in (*texts, "a cat on a dog"):
        numbers = ours.encode(text, 4).tolist()
        assert numbers == theirs.encode(text, 4)
        if ours.unknown not in numbers:
            assert ours.decode(numbers[1:]).split() == theirs.decode(numbers[1:])


def test_the_decoder_is_the_transformer_caption_head():
    """Same start, same scores in training and word by word."""
    words = Words(["a dog on a hill"], 1)
    torch.manual_seed(1)
    ours = CaptionDecoder(24, len(words), length=9, dim=48, layers=2)
    torch.manual_seed(1)
    options = {"in_channels": 24, "num_words": len(words), "max_length": 9, "dim": 48, "num_layers": 2}
    theirs = TransformerDecoder(**options, num_heads=4, feedforward_dim=96, dropout=0.1)
    cells, tokens = torch.randn(3, 64, 24), torch.randint(len(words), (3, 9))
    for training in (True, False):
        scores = []
        for decoder in (ours.train(training), theirs.train(training)):
            torch.manual_seed(2)
            found = decoder(cells, tokens)
            scores.append(decoder.scores(found[0] if decoder is theirs else found))
        assert torch.equal(*scores)
    forbidden = (0, words.unknown, words.start)
    ends = {"start": words.start, "end": words.end, "forbidden": forbidden, "max_length": 9}
    said = [words.decode([*ids, words.end]) for ids, _, _ in beam_search(theirs, cells, **ends)]
    assert ours.say(cells, words) == said


def test_a_tower_against_itself_has_the_same_figures(against_itself, monkeypatch):
    monkeypatch.setattr(unseen, "COUNTS", {"train": 24, "validation": 6, "test": 12, "development": 6})
    monkeypatch.setattr(captioning, "RECIPE", replace(captioning.RECIPE, epochs=2))
    unseen.scenes.cache_clear()
    (row,) = against_itself(captioning.CaptioningScenes, seeds=2)["families"]
    assert row["name"] == "captioning" and row["n"] == 12
