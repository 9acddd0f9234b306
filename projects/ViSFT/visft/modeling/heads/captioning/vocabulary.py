"""Words and their numbers, as a caption head reads and predicts them."""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from visft.checkpoint import files, run_folder
from visft.errors import CheckpointError, ConfigError, DataError

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"

_NO_WORD = re.compile(r"[^\w\s]|_")


def split_words(text: str) -> list[str]:
    """The words of a caption as heads learn them: lower case, without punctuation; `man's` is `mans`."""
    return _NO_WORD.sub(" ", text.lower().replace("'", "").replace("\u2019", "")).split()


def worded_captions(image: dict) -> list[str]:
    """The captions of an image that have words: one without any cannot be learned."""
    return [caption for caption in image.get("captions", ()) if split_words(caption)]


class Vocabulary:
    """Words by number: padding is 0, then the words, then unknown, start and end, the authors' order.

    Attributes:
        words: all of them by number, the four that are no words included.
        pad, unknown, start, end: the numbers of those four.
    """

    def __init__(self, words: Sequence[str]):
        """
        Args:
            words: the words by number, without the four.

        Raises:
            DataError: a word occurs twice, or is one of the four.
        """
        self.words = (PAD, *words, UNKNOWN, START, END)
        self._ids = {word: number for number, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise DataError(f"a vocabulary has the word {twice!r} twice; expected each word once")
        self.pad, self.unknown, self.start, self.end = (
            self._ids[word] for word in (PAD, UNKNOWN, START, END)
        )

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> "Vocabulary":
        """The words that occur in `captions` at least `min_count` times, the most frequent first, then by alphabet."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Vocabulary":
        """Read our vocabulary file (`{"words": [...]}`, by number), the authors' (a map of words to numbers), or the
        words stored with our weights of a caption head (.safetensors).

        Raises:
            DataError: the file is missing or has no vocabulary.
        """
        try:
            file = files.local_path(path)
            stored = os.fspath(path).endswith(".safetensors")
            content = {"words": _stored_words(file)} if stored else files.read_json(file)
        except CheckpointError as error:
            raise DataError(
                f"{error} Expected a vocabulary, as tools/build_vocabulary.py writes it."
            ) from error
        words = content.get("words") if isinstance(content, dict) else None
        if words is None and isinstance(content, dict) and content:
            words = _by_number(path, content)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError(
                f"{path}: is no vocabulary; expected a list of texts in `words`, or a map of words to numbers"
            )
        if words[:1] != [PAD] or words[-3:] != [UNKNOWN, START, END]:
            raise DataError(
                f"{path}: begins with {words[:1]} and ends with {words[-3:]}; expected {PAD} first and {UNKNOWN}, "
                f"{START}, {END} last: build it again with tools/build_vocabulary.py"
            )
        try:
            return cls(words[1:-3])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def write(self, path: str | os.PathLike) -> None:
        """Write `{"words": [...]}`, aside and renamed."""
        files.write_json(path, {"words": list(self.words)})

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    @property
    def sha256(self) -> str:
        """Of the words in their order."""
        return hashlib.sha256(json.dumps(self.words).encode()).hexdigest()

    def encode(self, text: str, max_length: int) -> list[int]:
        """A caption's numbers between start and end; at most `max_length` words, those after them are cut off."""
        words = split_words(text)[:max_length]
        return [self.start, *(self._ids.get(word, self.unknown) for word in words), self.end]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of numbers, up to the end if it is among them."""
        words = []
        for number in ids:
            if number == self.end:
                break
            words.append(self.words[number])
        return words


def _by_number(path: str | os.PathLike, content: dict) -> list[str]:
    numbers = list(content.values())
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if not whole or sorted(numbers) != list(range(len(numbers))):
        raise DataError(
            f"{path}: is no map of words to the numbers 0 to {len(numbers) - 1}, each once; expected a vocabulary, "
            "ours or the authors'"
        )
    return sorted(content, key=content.get)


def configured_vocabulary(cfg, name: str) -> Vocabulary:
    """The vocabulary of the head `name`: of the file that its VOCABULARY names, else that which a file of
    HEAD_FILES carries.

    Raises:
        ConfigError: there is neither.
        DataError: the file is missing or no vocabulary.
    """
    key, path = f"MODEL.VISFT.{name.upper()}.VOCABULARY", cfg.MODEL.VISFT[name.upper()].VOCABULARY
    path = path or next((file for file in _head_files(cfg) if carries_vocabulary(file)), None)
    if not path:
        raise ConfigError(
            f"{key} is empty: name a file that tools/build_vocabulary.py made (tools/train_net.py makes one by itself "
            "and keeps it in OUTPUT_DIR)"
        )
    try:
        return Vocabulary.read(path)
    except (CheckpointError, DataError) as error:
        raise DataError(f"{key}: {error}") from error


def carries_vocabulary(file: str | os.PathLike) -> bool:
    """Whether a weight file's description holds the words of its caption head."""
    try:
        return bool(_stored_words(file))
    except CheckpointError:  # named, with its key, by the check of weight files
        return False


def _stored_words(file: str | os.PathLike) -> list[str] | None:
    return run_folder.describe(file).get("settings", {}).get("vocabulary")


def _head_files(cfg) -> Iterator[Path]:
    for given in cfg.MODEL.VISFT.HEAD_FILES:
        with contextlib.suppress(CheckpointError):
            yield run_folder.head_file(given)
