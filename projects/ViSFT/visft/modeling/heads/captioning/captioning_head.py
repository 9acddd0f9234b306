"""What caption heads share: the caption learned from each image, the losses, beam search, and attention maps."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from visft.errors import ConfigError
from visft.modeling.heads.base import HeadInputs, VisftHead, nonzero_count
from visft.modeling.heads.captioning.beam_search import CaptionDecoder, beam_search
from visft.modeling.heads.captioning.vocabulary import Vocabulary, configured_vocabulary, worded_captions
from visft.utils import shared_random


class Caption(str):
    """A caption with its words and the head's attention at each.

    Attributes:
        words: the words.
        maps: attention `[T, g, g]` at each word, over the padded image; sums to 1.
        seen: the part (height, width) of the maps that is image, from the upper left.
        score: logarithm of the caption's probability.
    """

    words: tuple[str, ...]
    maps: Tensor
    seen: tuple[float, float]
    score: float

    def __new__(
        cls,
        text: str,
        words: tuple[str, ...] = (),
        maps: Tensor | None = None,
        seen: tuple[float, float] = (1.0, 1.0),
        score: float = 0.0,
    ) -> "Caption":
        caption = super().__new__(cls, text)
        caption.words, caption.seen, caption.score = words, seen, score
        caption.maps = torch.zeros(0, 1, 1) if maps is None else maps
        return caption

    def word_maps(self, height: int, width: int) -> Tensor:
        """The maps `[T, height, width]` laid over the image at that size, each scaled to 0..1."""
        if not len(self.maps):
            return torch.zeros(0, height, width)
        whole = (max(height, round(height / self.seen[0])), max(width, round(width / self.seen[1])))
        maps = F.interpolate(self.maps[None].float().cpu(), whole, mode="bicubic", align_corners=False)[0]
        maps = maps[:, :height, :width].clamp(min=0)
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


class CaptioningHead(VisftHead):
    """A head that describes an image in words: pooled features, a decoder over a vocabulary, cross-entropy.

    A subclass makes the decoder and may add losses. Training learns one of an image's captions at a time. It follows
    from one number a forward pass and the image's id, so processes that share a seed draw what one process with all
    their images would.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        *,
        vocabulary: Vocabulary,
        grid: int = 14,
        max_length: int = 30,
        beam_size: int = 3,
    ):
        """
        Args:
            decoder: over as many words as the vocabulary has.
            grid: features are averaged to `grid` x `grid` cells.
            max_length: most words of a caption; longer ones are cut in training.
            beam_size: captions followed at a time in inference; 1: greedy.

        Raises:
            ConfigError: a number is below 1.
        """
        super().__init__()
        if min(grid, max_length, beam_size) < 1:
            raise ConfigError(
                f"GRID {grid}, MAX_LENGTH {max_length}, BEAM_SIZE {beam_size}: expected at least 1 each"
            )
        self.decoder, self.vocabulary = decoder, vocabulary
        self.grid, self.max_length, self.beam_size = grid, max_length, beam_size
        self._draw = 0

    @staticmethod
    def common_config(cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict[str, Any]:
        """The constructor's arguments that every caption head reads from its node `MODEL.VISFT.<NAME>`."""
        node = cfg.MODEL.VISFT[name.upper()]
        return {
            "in_channels": input_shape.channels,
            "vocabulary": configured_vocabulary(cfg, name),
            "grid": node.GRID,
            "max_length": node.MAX_LENGTH,
            "beam_size": node.BEAM_SIZE,
            "dropout": node.DROPOUT,
        }

    def cells(self, features: Tensor) -> Tensor:
        """Features `[N, C, h, w]` -> averages over cells `[N, P, C]`, row by row, padding included."""
        features = features.to(next(self.decoder.parameters()).dtype)
        return F.adaptive_avg_pool2d(features, self.grid).flatten(2).transpose(1, 2)

    def has_labels(self, image: dict) -> bool:
        return bool(worded_captions(image))

    def draw(self) -> None:
        """Draw the number that decides, with an image's id, which of its captions this pass learns."""
        self._draw = shared_random.number()

    def normalizers(self, images: list[dict]) -> Tensor:
        """[2]: number of words to predict, ends included; number of captions."""
        lengths = [len(tokens) - 1 for tokens in self._captions(images)]
        return torch.tensor([float(sum(lengths)), float(len(lengths))])

    def losses(self, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
        captions = self._captions(inputs.images)
        tokens = pad_sequence(captions, batch_first=True, padding_value=self.vocabulary.pad)
        tokens = tokens.to(inputs.features.device)
        lengths = torch.tensor([len(caption) - 1 for caption in captions])
        return self.caption_losses(self.cells(inputs.features), tokens, lengths, normalizers)

    def caption_losses(
        self, cells: Tensor, tokens: Tensor, lengths: Tensor, normalizers: Tensor
    ) -> dict[str, Tensor]:
        """Losses by teacher forcing: each word is predicted from the true words before it.

        Args:
            cells: `[N, P, C]`.
            tokens: captions `[N, T]`, start and end included, padded.
            lengths: `[N]` words to predict, ends included; on the CPU, or the program waits for the device.
            normalizers: `[2]`, of `normalizers`.
        """
        hidden, attention = self.decoder(cells, tokens[:, :-1])
        is_word = torch.arange(hidden.shape[1], device=lengths.device) < lengths[:, None]
        words_at, is_word = is_word.flatten().nonzero()[:, 0].to(tokens.device), is_word.to(tokens.device)
        # Only where there is a word: the vocabulary makes scores the largest tensor by far.
        scores = self.decoder.scores(hidden.flatten(0, 1).index_select(0, words_at)).float()
        words, captions = nonzero_count(normalizers.to(scores.device)).unbind()
        loss = F.cross_entropy(scores, tokens[:, 1:].flatten()[words_at], reduction="sum") / words
        return {"loss_words": loss, **self.attention_losses(attention * is_word[..., None], captions)}

    def attention_losses(self, attention: Tensor, captions: Tensor) -> dict[str, Tensor]:
        """Further losses on attention `[N, T, P]`, which is 0 after a caption's end; none by default."""
        return {}

    def inference(self, inputs: HeadInputs) -> list[Caption]:
        vocabulary = self.vocabulary
        found = beam_search(
            self.decoder,
            self.cells(inputs.features),
            start=vocabulary.start,
            end=vocabulary.end,
            forbidden=(vocabulary.pad, vocabulary.unknown, vocabulary.start),
            beam_size=self.beam_size,
            max_length=self.max_length,
        )
        captions = []
        for (ids, maps, score), (height, width) in zip(found, inputs.image_sizes, strict=True):
            words = tuple(vocabulary.decode(ids))
            maps = maps.view(-1, self.grid, self.grid).cpu()
            seen = (height / inputs.padded_size[0], width / inputs.padded_size[1])
            captions.append(Caption(" ".join(words), words, maps, seen, score))
        return captions

    def _captions(self, images: list[dict]) -> list[Tensor]:
        """The numbers of one caption of each image, start and end included."""
        chosen = []
        for index, image in enumerate(images):
            captions = worded_captions(image)
            generator = shared_random.image_generator(self._draw, image, index)
            caption = captions[int(torch.randint(len(captions), (1,), generator=generator))]
            chosen.append(torch.tensor(self.vocabulary.encode(caption, self.max_length)))
        return chosen
