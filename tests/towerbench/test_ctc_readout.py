"""Reading by CTC: spelling and edits by hand, exact features at the top and those of other words at the bottom."""

import numpy as np
import torch

from towerbench import ctc_readout

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_edit_distance_and_spelling_by_hand():
    assert ctc_readout.edit_distance("kitten", "sitting") == 3 and ctc_readout.edit_distance("", "ab") == 2
    scores = ctc_readout.accuracies(["cat", "cut", ""], ["cat", "cat", "cat"])
    assert np.allclose(scores, [[1, 1], [0, 2 / 3], [0, 0]])
    path = torch.eye(27)[[3, 3, 0, 1, 20, 20, 0, 20]][:, None]
    assert ctc_readout.spelled(path, LETTERS) == ["catt"]
    letters, lengths = ctc_readout.encoded(["cat", "b"], LETTERS)
    assert letters.tolist() == [3, 1, 20, 2] and lengths.tolist() == [3, 1]


def columns(words, rng):
    """Columns `[N, 26 + 2, 16]` that tell the letter: each is two columns wide, from any place on."""
    found = np.zeros((len(words), 28, 16), np.float32)
    for row, word in zip(found, words, strict=True):
        start = rng.integers(0, 17 - 2 * len(word))
        for place, c in enumerate(word):
            row[LETTERS.index(c), start + 2 * place : start + 2 * place + 2] = 5
    return torch.from_numpy(found + 0.1 * rng.standard_normal(found.shape).astype(np.float32))


def words(count, rng):
    return ["".join(rng.choice(list(LETTERS), rng.integers(3, 8))) for _ in range(count)]


def test_exact_features_are_read_and_those_of_other_words_are_not(monkeypatch):
    monkeypatch.setattr(ctc_readout, "WEIGHT_DECAYS", (0.01,))
    rng = np.random.default_rng(0)
    train, test = words(900, rng), words(60, rng)
    sides = (columns(train, rng), train), (columns(test, rng), test)
    reader = ctc_readout.trained(*sides, LETTERS, 0, epochs=20)
    seen = columns(test, rng)
    word, character = ctc_readout.accuracies(reader.read(seen), test).mean(0)
    other = ctc_readout.accuracies(reader.read(seen.roll(7, 0)), test).mean(0)
    assert word > 0.9 and character > 0.97
    assert other[0] < 0.05 and other[1] < 0.4
    few = [(found[:64], read[:64]) for found, read in sides]
    first, again = (ctc_readout.trained(*few, LETTERS, 0, epochs=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_every_start_comes_to_read_equally_well(monkeypatch):
    """On mixed and noisy channels; a reader that does not start with blanks ends between 0.74 and 0.89 of the words."""
    monkeypatch.setattr(ctc_readout, "WEIGHT_DECAYS", (0.01,))
    rng, noise = np.random.default_rng(0), torch.Generator().manual_seed(1)
    train, test = words(600, rng), words(100, rng)
    mixing = torch.randn(28, 200, generator=noise) / 5

    def mixed(exact):
        return torch.einsum("ncw,cd->ndw", exact, mixing) + torch.randn(len(exact), 200, 16, generator=noise)

    sides = [(mixed(columns(each, rng)), each) for each in (train, test)]
    readers = [ctc_readout.trained(*sides, LETTERS, seed, epochs=20) for seed in range(3)]
    found = [ctc_readout.accuracies(reader.read(sides[1][0]), test)[:, 0].mean() for reader in readers]
    assert min(found) > 0.88 and max(found) - min(found) < 0.07


def test_columns_are_those_of_the_lines():
    """A map that says its own row and column, in a tower that has nothing else."""

    class Tower:
        def dense(self, images, start, stop):
            rows = torch.arange(16.0)[:, None].expand(16, 12)
            whole = torch.stack((rows, torch.arange(12.0).expand(16, 12)))
            return torch.stack([whole + 100 * number for number in range(start, stop)])

    class Three:
        count = 3

    [found] = ctc_readout.columns(Tower(), Three(), 12)
    assert found.shape == (12, 4, 12)  # two rows of two channels
    # Line 1 of image 2 is the rows 4 to 7 of 16, halved: their means are 4.5 and 6.5.
    assert found[2 * 4 + 1, 0].tolist() == [204.5] * 12 and found[2 * 4 + 1, 2].tolist() == [206.5] * 12
    assert found[0, 1].tolist() == list(range(12))
    [wider] = ctc_readout.columns(Tower(), Three(), 24)
    assert wider.shape == (12, 4, 24)
