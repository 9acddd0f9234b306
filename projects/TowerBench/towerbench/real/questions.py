"""Questions on images in VQA's files, and how an answer is scored (arXiv:1505.00468, visualqa.org/evaluation)."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from towerbench.errors import DataError
from towerbench.real import sources
from towerbench.real.sources import field

NUMBERS = {"none": "0"} | {
    name: str(value)
    for value, name in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@dataclass(frozen=True)
class Question:
    """A question on an image.

    Args:
        scores: the score of every answer that a person gave. All others have 0.
    """

    text: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Asked:
    """Images and their questions.

    Args:
        images: their numbers in COCO.
        questions: of each image, at least one.
    """

    images: Sequence[int]
    questions: Sequence[Sequence[Question]]

    def part(self, places: Iterable[int]) -> "Asked":
        """Return some of its images."""
        return sources.rows_of(self, places, "images", "questions")

    @property
    def every(self) -> list[Question]:
        """All questions, image by image."""
        return [question for several in self.questions for question in several]


@functools.lru_cache(maxsize=1 << 18)
def normalised(answer: str) -> str:
    """Return an answer in the form for comparisons: without punctuation, articles and case, number words in digits.

    A sign is removed if a space is beside it, or if the answer has a comma between digits. Otherwise it becomes a
    space. A full stop before a digit is kept. Apostrophes are correct in the files.
    """
    found = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", found) is not None
    for sign in PUNCTUATION:
        beside = f"{sign} " in answer or f" {sign}" in answer
        found = found.replace(sign, "" if beside or grouped else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = (NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(word for word in words if word not in ARTICLES)


def soft_accuracy(matches: int, people: int) -> float:
    """Return the score of an answer that `matches` of a number of people gave.

    It is min(matches / 3, 1) among all people but one, as the mean over who is left out.
    """
    own, other = min((matches - 1) / 3, 1), min(matches / 3, 1)
    return (matches * own + (people - matches) * other) / people


def scores(answers: Sequence[str]) -> dict[str, float]:
    """Return the soft accuracy of every answer that was given, by its normalised form."""
    counted = Counter(map(normalised, answers))
    return {answer: soft_accuracy(count, len(answers)) for answer, count in counted.items()}


def read(questions: Path, annotations: Path, most: int) -> Asked:
    """Return the questions on no more than `most` images. The images are spread over the set and always the same.

    Raises:
        DataError: a file is broken, a question has no annotation or the other way round, or they differ in the image.
    """
    asked: dict[int, tuple[int, str]] = {}
    for entry in field(sources.read_json(questions), "questions", questions, list):
        number = field(entry, "question_id", questions, int)
        if number in asked:
            raise DataError(f"{questions}: question {number} is there twice; get the file again")
        text = field(entry, "question", questions, str).strip()
        asked[number] = field(entry, "image_id", questions, int), text
    if not asked:
        raise DataError(f"{questions}: has no question; get it again")
    every = sorted({image for image, _ in asked.values()})
    chosen = {every[i] for i in sources.spread(len(every), most)}
    by_image: dict[int, list[tuple[int, Question]]] = {}
    seen = set()
    for entry in field(sources.read_json(annotations), "annotations", annotations, list):
        number = field(entry, "question_id", annotations, int)
        image = field(entry, "image_id", annotations, int)
        if number in seen:
            raise DataError(f"{annotations}: question {number} is there twice; get the file again")
        seen.add(number)
        if asked.get(number, (None,))[0] != image:
            raise DataError(
                f"{annotations}: question {number} on image {image} is not in {questions}; get both of one version"
            )
        if image in chosen:
            given = field(entry, "answers", annotations, list)
            texts = [field(answer, "answer", annotations, str) for answer in given]
            if len(texts) < 2:
                raise DataError(
                    f"{annotations}: question {number} has {len(texts)} answers; ten were expected; get it again"
                )
            question = Question(asked[number][1], scores(texts))
            by_image.setdefault(image, []).append((number, question))
    if len(seen) < len(asked):
        number = next(number for number in asked if number not in seen)
        raise DataError(
            f"{annotations}: has no annotation of question {number}, which {questions} asks; get both of one version"
        )
    images = sorted(by_image)
    return Asked(images, [[each for _, each in sorted(by_image[p], key=lambda e: e[0])] for p in images])


# ---------------------------------------------------------------- answers without the image

BEGINNING = 5
"""Number of words of a question that are compared, if it is answered without its image."""

FREQUENT = 5
"""Least number of training questions with the same beginning, for their answers to be used."""


def most_frequent(train: Sequence[Question], count: int) -> list[str]:
    """Return the answers with the highest score over the training, the best first."""
    total: Counter[str] = Counter()
    for question in train:
        total.update(question.scores)
    return sorted(total, key=lambda answer: (-total[answer], answer))[:count]


def worth(test: Sequence[Question], answers: Iterable[str]) -> float:
    """Return the mean soft accuracy of one answer to each question."""
    found = [question.scores.get(answer, 0.0) for question, answer in zip(test, answers, strict=True)]
    return sum(found) / len(found)


def guessed(train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """Return for each question the best training answer to questions with the same first words, as many words as are
    frequent there."""
    alike: dict[tuple[str, ...], list[Question]] = {}
    for question in train:
        for beginning in _beginnings(question.text):
            alike.setdefault(beginning, []).append(question)
    known: dict[tuple[str, ...], str] = {}
    found = []
    for question in test:
        several = _beginnings(question.text)
        chosen = next((b for b in several if len(alike.get(b, ())) >= FREQUENT), ())
        if chosen not in known:
            known[chosen] = most_frequent(alike.get(chosen, train), 1)[0]
        found.append(known[chosen])
    return found


def _beginnings(text: str) -> list[tuple[str, ...]]:
    """Return the beginnings of a question, the longest first. The longest may be the whole question, the last has no
    word."""
    words = tuple(re.findall(r"[\w']+", text.lower()))[:BEGINNING]
    return [words[:length] for length in range(len(words), -1, -1)]
