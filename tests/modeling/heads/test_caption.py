"""Caption heads: search against exhaustive search, both ways into a decoder, losses, what is drawn, learning."""

import itertools
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from visft import add_visft_config
from visft.errors import ConfigError, DataError
from visft.modeling.heads import (
    Caption,
    CaptionHead,
    HeadInputs,
    TransformerCaptionHead,
    Vocabulary,
    build_head,
)
from visft.modeling.heads.captioning.beam_search import beam_search

WORDS = ("ant", "bee", "cow")
CHANNELS, GRID = 12, 3
SIZES = {
    CaptionHead: {"attention_dim": 8, "embedding_dim": 8, "hidden_dim": 16},
    TransformerCaptionHead: {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "feedforward_dim": 16},
}


def make(kind=CaptionHead, *, sharpen: float = 4.0, **options):
    """A small head whose random weights have opinions."""
    torch.manual_seed(3)
    settings = {"in_channels": CHANNELS, "vocabulary": Vocabulary(WORDS), "grid": GRID, "dropout": 0.0}
    head = kind(**settings | SIZES[kind] | options).eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpen if "embedding" not in name else 1.5)
    return head


def word_bias(head) -> torch.Tensor:
    """What is added to the words' scores."""
    return head.decoder.fc.bias if isinstance(head, CaptionHead) else head.decoder.bias


@pytest.fixture(params=SIZES, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def cells(count: int = 4) -> torch.Tensor:
    return torch.randn(count, GRID * GRID, CHANNELS, generator=torch.Generator().manual_seed(5))


def search(head, cells, **options) -> list[tuple[list[int], torch.Tensor, float]]:
    words = head.vocabulary
    return beam_search(
        head.decoder,
        cells,
        start=words.start,
        end=words.end,
        forbidden=(words.pad, words.unknown, words.start),
        **options,
    )


@torch.no_grad()
def scores(head, cell: torch.Tensor, captions: list[tuple[int, ...]], max_length: int) -> list[float]:
    """Logarithmic probabilities of captions of one length, each read as a whole."""
    words, length = head.vocabulary, len(captions[0])
    tokens = torch.tensor([[words.start, *caption, words.end] for caption in captions])
    hidden, _ = head.decoder(cell.expand(len(captions), -1, -1), tokens[:, :-1])
    steps = head.decoder.scores(hidden).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    # A caption that is as long as it may be ends at no cost.
    return steps[:, : length + (length < max_length)].sum(1).tolist()


def test_a_wide_beam_finds_the_best_of_all_captions(kind):
    head, length = make(kind), 4
    known = [head.vocabulary.words.index(word) for word in WORDS]
    every = [list(itertools.product(known, repeat=n)) for n in range(1, length + 1)]
    found = search(head, cells(), beam_size=sum(map(len, every)), max_length=length)
    for cell, (ids, maps, total) in zip(cells(), found, strict=True):
        known_scores: dict[tuple[int, ...], float] = {}
        for captions in every:
            known_scores |= zip(captions, scores(head, cell, captions, length), strict=True)
        best = max(known_scores, key=known_scores.get)
        assert tuple(ids) == best
        assert total == pytest.approx(known_scores[best], abs=1e-4)
        assert maps.shape == (len(ids), GRID * GRID)
    assert len({tuple(ids) for ids, *_ in found}) > 1, "the images would not matter"


@pytest.mark.parametrize("beam_size", [1, 2, 3, 6])
def test_what_a_beam_says_has_the_probability_that_it_says(kind, beam_size):
    """Whatever is said: the states that a beam carries are those of its own words."""
    head, length, longest = make(kind), 7, 0
    with torch.no_grad():
        word_bias(head)[head.vocabulary.end] -= 6
    for cell, (ids, maps, total) in zip(
        cells(), search(head, cells(), beam_size=beam_size, max_length=length), strict=True
    ):
        assert total == pytest.approx(scores(head, cell, [tuple(ids)], length)[0], abs=1e-4)
        with torch.no_grad():
            _, attention = head.decoder(cell[None], torch.tensor([[head.vocabulary.start, *ids]]))
        assert torch.allclose(maps, attention[0, : len(ids)], atol=1e-5)
        longest = max(longest, len(ids))
    assert longest > 3, "short captions would prove little"


def test_greedy_takes_the_likeliest_word_at_each_step(kind):
    head = make(kind)
    words = head.vocabulary
    for cell, (ids, maps, _) in zip(cells(), search(head, cells(), beam_size=1, max_length=6), strict=True):
        said = [words.start]
        while len(said) <= 6:
            with torch.no_grad():
                hidden, attention = head.decoder(cell[None], torch.tensor([said]))
                scores = head.decoder.scores(hidden[0, -1])
            barred = [words.pad, words.unknown, words.start] + ([words.end] if len(said) == 1 else [])
            scores[barred] = -torch.inf
            if scores.argmax() == words.end:
                break
            said.append(int(scores.argmax()))
        assert ids == said[1:]
        with torch.no_grad():
            _, attention = head.decoder(cell[None], torch.tensor([said]))
        assert torch.allclose(maps, attention[0, : len(ids)], atol=1e-5)


def test_lengths_are_bounded_and_no_caption_is_empty(kind):
    head = make(kind)
    bias = word_bias(head)
    with torch.no_grad():
        bias[head.vocabulary.end] = -1e3  # it never wants to end
    assert {len(ids) for ids, *_ in search(head, cells(), beam_size=2, max_length=5)} == {5}
    with torch.no_grad():
        bias[head.vocabulary.end] = 1e3  # nor to begin
        bias[head.vocabulary.unknown] = 2e3
    for ids, *_ in search(head, cells(), beam_size=2, max_length=5):
        assert len(ids) == 1 and head.vocabulary.words[ids[0]] in WORDS


def test_an_image_is_described_alike_alone_and_among_others(kind):
    head = make(kind)
    together = search(head, cells(), beam_size=3, max_length=5)
    for cell, (ids, maps, total) in zip(cells(), together, strict=True):
        ((alone, alone_maps, alone_total),) = search(head, cell[None], beam_size=3, max_length=5)
        assert alone == ids and torch.allclose(alone_maps, maps, atol=1e-5)
        assert alone_total == pytest.approx(total, abs=1e-4)


def test_a_word_at_a_time_is_as_all_at_once(kind):
    head, tokens = make(kind), torch.tensor([[5, 1, 2, 3], [5, 3, 3, 1], [5, 2, 1, 1], [5, 1, 1, 1]])
    with torch.no_grad():
        hidden, attention = head.decoder(cells(), tokens)
        state = head.decoder.start(cells())
        for t in range(tokens.shape[1]):
            h, alpha, state = head.decoder.step(state, tokens[:, t])
            assert torch.allclose(h, hidden[:, t], atol=1e-5)
            assert torch.allclose(alpha, attention[:, t], atol=1e-5)
    assert torch.allclose(attention.sum(2), torch.ones(4, 4), atol=1e-5)


def picture(number: int, *captions: str) -> dict:
    return {"image_id": number, "captions": list(captions)}


PICTURES = [
    picture(1, "Ant bee.", "cow"),
    picture(2, "bee"),
    picture(3, "cow cow cow ant", "Bee, ant!"),
    picture(4, "dog"),
]


def features(count: int = 4) -> torch.Tensor:
    return torch.randn(count, CHANNELS, 5, 7, generator=torch.Generator().manual_seed(6))


def losses(head, maps: torch.Tensor, images: list[dict], normalizers=None) -> dict[str, torch.Tensor]:
    head.draw()
    own = head.normalizers(images)
    count = len(images)
    mask, sizes = torch.zeros(count, 5, 7, dtype=torch.bool), [(40, 56)] * count
    return head.losses(
        HeadInputs(maps, mask, images, sizes, (40, 56)), own if normalizers is None else normalizers
    )


def test_words_loss_is_the_mean_of_the_captions_words(kind):
    head, maps = make(kind), features()
    torch.manual_seed(1)
    found = losses(head, maps, PICTURES)["loss_words"].item()
    chosen = [tokens.tolist() for tokens in head._captions(PICTURES)]
    total = words = 0.0
    for row, tokens in enumerate(chosen):
        hidden, _ = head.decoder(head.cells(maps[row : row + 1]), torch.tensor([tokens[:-1]]))
        steps = head.decoder.scores(hidden)[0].log_softmax(-1)
        total -= steps.gather(1, torch.tensor(tokens[1:])[:, None]).sum().item()
        words += len(tokens) - 1
    assert found == pytest.approx(total / words, rel=1e-5)
    assert chosen[3][1] == head.vocabulary.unknown


def test_attention_loss_is_that_of_the_paper():
    head, maps = make(attention_weight=2.0), features()
    torch.manual_seed(1)
    found = losses(head, maps, PICTURES)["loss_attention"].item()
    expected = 0.0
    for row, tokens in enumerate(head._captions(PICTURES)):
        _, attention = head.decoder(head.cells(maps[row : row + 1]), tokens[None, :-1])
        expected += 2 * (1 - attention[0].sum(0)).square().mean().item() / len(PICTURES)
    assert found == pytest.approx(expected, rel=1e-5)
    assert "loss_attention" not in losses(make(TransformerCaptionHead), maps, PICTURES)


def test_processes_train_as_one_with_the_joined_batch(kind):
    head, maps = make(kind), features()
    torch.manual_seed(1)
    whole = losses(head, maps, PICTURES)
    parts, counts = [(0, 1), (2, 3)], []
    for rows in parts:
        torch.manual_seed(1)
        head.draw()
        counts.append(head.normalizers([PICTURES[i] for i in rows]))
    mean = torch.stack(counts).mean(0)
    split = []
    for rows in parts:
        torch.manual_seed(1)
        split.append(losses(head, maps[list(rows)], [PICTURES[i] for i in rows], mean))
    for name, value in whole.items():
        assert torch.stack([part[name] for part in split]).mean().item() == pytest.approx(
            value.item(), rel=1e-5
        )


def test_which_caption_is_learned_changes_with_the_seed_and_the_image_alone():
    head = make()
    images = [picture(number, *WORDS) for number in range(20)]

    def chosen(seed: int, images: list[dict]) -> list[int]:
        torch.manual_seed(seed)
        head.draw()
        return [int(tokens[1]) for tokens in head._captions(images)]

    first = chosen(0, images)
    assert set(first) == {1, 2, 3}
    assert chosen(0, images[::-1]) == first[::-1]
    assert chosen(1, images) != first
    torch.manual_seed(0)
    head.draw()  # a process without captions draws as the others do
    after = torch.rand(1)
    chosen(0, images)
    assert torch.rand(1) == after


def test_images_without_words_are_no_labels():
    head = make()
    assert head.has_labels(PICTURES[0])
    assert not head.has_labels({"image_id": 1})
    assert not head.has_labels(picture(1)) and not head.has_labels(picture(1, "", " ... "))
    head.draw()
    assert head._captions([picture(1, "", "bee")])[0].tolist() == head.vocabulary.encode("bee", 30)


def test_it_learns_to_tell_images_apart(kind):
    head = make(kind, sharpen=1.0, beam_size=2).train()
    maps = features(3)
    images = [picture(1, "ant bee cow"), picture(2, "cow"), picture(3, "bee bee ant")]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        sum(losses(head, maps, images).values()).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        found = head.inference(HeadInputs(maps, None, images, [(40, 56)] * 3, (40, 56)))
    assert found == ["ant bee cow", "cow", "bee bee ant"]
    assert [caption.words for caption in found] == [tuple(text.split()) for text in found]
    assert all(caption.maps.shape == (len(caption.words), GRID, GRID) for caption in found)


def test_every_parameter_learns(kind):
    head = make(kind).train()
    sum(losses(head, features(), PICTURES).values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_word_maps_lie_over_the_image_without_its_padding():
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 0] = maps[1, 0, 3] = 1  # the second is where the padding is
    caption = Caption("ant bee", ("ant", "bee"), maps, seen=(0.5, 0.5))
    found = caption.word_maps(20, 30)
    assert found.shape == (2, 20, 30)
    assert found[0].max() == 1
    row, column = divmod(int(found[0].argmax()), 30)
    assert row > 10 and column < 15
    whole = Caption("bee", ("bee",), maps[1:]).word_maps(20, 30)
    row, column = divmod(int(whole[0].argmax()), 30)
    assert row < 5 and column > 22
    assert Caption("").word_maps(4, 4).shape == (0, 4, 4)


def test_a_caption_is_a_text_and_survives_the_way_between_processes():
    caption = Caption("ant bee", ("ant", "bee"), torch.rand(2, 3, 3), (0.5, 1.0), -1.5)
    again = pickle.loads(pickle.dumps(caption))
    assert isinstance(caption, str) and caption == "ant bee" == again
    assert again.words == caption.words and torch.equal(again.maps, caption.maps)
    assert (again.seen, again.score) == (caption.seen, caption.score)


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_visft_config(cfg)
    Vocabulary(WORDS).write(tmp_path / "vocabulary.json")
    cfg.MODEL.VISFT.CAPTIONING.VOCABULARY = str(tmp_path / "vocabulary.json")
    return cfg


def test_sizes_come_from_the_config(cfg):
    node = cfg.MODEL.VISFT.CAPTIONING
    keys = {"EMBEDDING_DIM": 20, "ATTENTION_DIM": 24, "HIDDEN_DIM": 28, "DROPOUT": 0.3, "GRID": 5}
    keys |= {"MAX_LENGTH": 9, "BEAM_SIZE": 2, "ATTENTION_WEIGHT": 0.5}
    node.merge_from_list([word for pair in keys.items() for word in pair])
    head = build_head(cfg, "captioning", ShapeSpec(channels=CHANNELS, stride=8))
    assert isinstance(head, CaptionHead)
    assert head.decoder.embedding.weight.shape == (7, 20)
    assert head.decoder.attention.encoder_att.weight.shape == (24, CHANNELS)
    assert head.decoder.fc.weight.shape == (7, 28)
    assert (head.decoder.dropout, head.grid, head.max_length, head.beam_size) == (0.3, 5, 9, 2)
    assert head.attention_weight == 0.5
    keys = {"HEAD": "TransformerCaptionHead", "NUM_LAYERS": 4, "NUM_ATTENTION_HEADS": 5, "FEEDFORWARD_DIM": 6}
    node.merge_from_list([word for pair in keys.items() for word in pair])
    head = build_head(cfg, "captioning", ShapeSpec(channels=CHANNELS, stride=8))
    assert isinstance(head, TransformerCaptionHead)
    assert len(head.decoder.layers) == 4
    assert head.decoder.layers[0].cross_attn.num_heads == 5
    assert head.decoder.layers[0].linear1.weight.shape == (6, 20)
    assert head.decoder.layers[0].dropout.p == 0.3
    assert head.decoder.position.weight.shape == (10, 20)


def test_what_does_not_go_together_is_refused(cfg):
    node, shape = cfg.MODEL.VISFT.CAPTIONING, ShapeSpec(channels=CHANNELS, stride=8)
    for key, value, words in (
        ("BEAM_SIZE", 0, "BEAM_SIZE 0"),
        ("HEAD", "TransformerCaptionHead", None),
        ("NUM_ATTENTION_HEADS", 7, "EMBEDDING_DIM is 384.*NUM_ATTENTION_HEADS"),
        ("VOCABULARY", "/nowhere/words.json", "CAPTIONING.VOCABULARY.*/nowhere/words.json"),
        ("VOCABULARY", "", "VOCABULARY is empty.*build_vocabulary"),
    ):
        before = node[key]
        node[key] = value
        if words:
            with pytest.raises((ConfigError, DataError), match=words):
                build_head(cfg, "captioning", shape)
            node[key] = before
