"""Vocabularies: their order, their files, words and back."""

import json

import pytest
import torch
from safetensors.torch import save_file

from visft.errors import DataError
from visft.modeling.heads import Vocabulary
from visft.modeling.heads.captioning.vocabulary import split_words

CAPTIONS = ["A dog, a cat.", "Two dogs!", "a DOG's dog", "the cat", "zebra apple", "apple zebra"]


def test_words_are_ordered_by_count_then_alphabet():
    words = Vocabulary.build(CAPTIONS, 2)
    assert words.words == ("<pad>", "a", "apple", "cat", "dog", "dogs", "zebra", "<unk>", "<start>", "<end>")
    assert Vocabulary.build(CAPTIONS[::-1], 2) == words
    assert Vocabulary.build(CAPTIONS, 3).words[1:-3] == ("a",)
    assert len(Vocabulary.build(CAPTIONS, 1)) == 4 + len({w for c in CAPTIONS for w in split_words(c)})


def test_numbers_are_the_authors():
    words = Vocabulary([f"w{i}" for i in range(9486)])
    assert (len(words), words.pad, words.unknown, words.start, words.end) == (9490, 0, 9487, 9488, 9489)


def test_a_caption_and_back():
    words = Vocabulary.build(CAPTIONS, 2)
    ids = words.encode("A zebra's dog", 30)
    assert ids == [8, 1, 7, 4, 9]
    assert words.decode(ids[1:]) == ["a", "<unk>", "dog"]
    assert words.encode("a a a a", 2) == [8, 1, 1, 9]
    assert words.encode("", 2) == [8, 9]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's T-shirt.", ["a", "mans", "t", "shirt"]),
        ("  Two\ndogs -- (wet)!  ", ["two", "dogs", "wet"]),
        ("caf\u00e9 n\u00b0 5_6", ["caf\u00e9", "n", "5", "6"]),
        ("don\u2019t", ["dont"]),
        ("...", []),
    ],
)
def test_words_of_a_caption(text, words):
    assert split_words(text) == words


def test_files_of_ours_and_of_the_authors(tmp_path):
    words = Vocabulary.build(CAPTIONS, 2)
    words.write(tmp_path / "ours.json")
    assert Vocabulary.read(tmp_path / "ours.json") == words
    assert json.loads((tmp_path / "ours.json").read_text()) == {"words": list(words.words)}
    numbers = {word: number for number, word in enumerate(words.words)}
    shuffled = {word: numbers[word] for word in sorted(numbers, reverse=True)}
    (tmp_path / "theirs.json").write_text(json.dumps(shuffled))
    assert Vocabulary.read(tmp_path / "theirs.json") == words
    about = json.dumps({"settings": {"vocabulary": list(words.words)}})
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors", {"visft": about})
    assert Vocabulary.read(tmp_path / "weights.safetensors") == words


SPECIALS = ["<unk>", "<start>", "<end>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file|cannot be read|No such"),
        ("", "no valid JSON"),
        ("[1, 2]", "no vocabulary"),
        ('{"words": {"a": 1}}', "no vocabulary"),
        (json.dumps({"words": ["<pad>", 3, *SPECIALS]}), "list of texts"),
        (json.dumps({"words": ["a", "b", *SPECIALS]}), "begins with.*'a'"),
        (json.dumps({"words": ["<pad>", "a", "b"]}), "ends with"),
        (json.dumps({"words": ["<pad>", "a", "a", *SPECIALS]}), "'a' twice"),
        (json.dumps({"<pad>": 0, "a": 1, "<unk>": 2, "<start>": 3, "<end>": 5}), "numbers 0 to 4"),
        (json.dumps({"<pad>": 0, "a": 1, "<start>": 2, "<unk>": 3, "<end>": 4}), "ends with"),
    ],
)
def test_what_is_no_vocabulary_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "words.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Vocabulary.read(path)
    assert str(path) in str(caught.value)


def test_weights_without_words_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="weights.safetensors"):
        Vocabulary.read(tmp_path / "weights.safetensors")
