"""Questions on unseen scenes, answered from the feature map: is there one, how many, which colour, which side."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from towerbench import readout_training
from towerbench.demo import regions, unseen
from towerbench.features import FeatureStore, Images
from towerbench.registry import Benchmark, register

ANSWERS = {
    "presence": ("no", "yes"),
    "count": ("one", "two", "three", "four or more"),
    "colour": (
        "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow",
    ),
    "relation": ("left", "right", "above", "below"),
}  # fmt: skip
KINDS = tuple(ANSWERS)
EPOCHS, BATCH, RATE, WIDTH = 20, 40, 3e-3, 96
WEIGHT_DECAY = 0.05
STARTS = 3
"""Number of models that are trained. Scores are their mean, because the start alone moves the accuracy by some 2
points."""
PRIOR = 5.0
"""Weight, in questions, of the answers to a kind against the answers about one thing, for guesses without an image."""


@dataclass(frozen=True)
class Question:
    """A question on a scene.

    Args:
        scene: number of the scene in its part.
        kind: index into KINDS.
        first, second: the categories in the question. None if the kind does not need them.
        answer: index into the ANSWERS of its kind.
    """

    scene: int
    kind: int
    first: int | None
    second: int | None
    answer: int

    def __str__(self) -> str:
        names = [unseen.categories()[c] for c in (self.first, self.second) if c is not None]
        return (
            "is there a {}?", "how many of this are there: {}?", "which colour is the background?",
            "on which side of {1} is {0}?",
        )[self.kind].format(*names)  # fmt: skip


@functools.lru_cache(maxsize=4)
def questions(part: str) -> tuple[Question, ...]:
    """Return the questions on every scene: whether a thing is there (for one that is and one that is not), how many
    there are, and which colour. If there are two kinds of things, also how they lie, asked in both orders."""
    found = []
    for number, scene in enumerate(unseen.scenes(part)):
        rng = np.random.default_rng([15, list(unseen.COUNTS).index(part), number])
        groups: dict[int, list] = {}
        for item in scene.objects:
            groups.setdefault(item.category, []).append(item)
        there = rng.permutation(sorted(groups)).tolist()
        missing = [c for c in range(len(unseen.categories())) if c not in groups]
        found += [
            Question(number, 0, int(there[0]), None, 1),
            Question(number, 0, int(rng.choice(missing)), None, 0),
        ]
        most = max(there, key=lambda c: (len(groups[c]), c))  # otherwise `one` would be nearly every answer
        found.append(Question(number, 1, most, None, min(len(groups[most]), 4) - 1))
        colour = scene.captions[2].rsplit(" on ", 1)[1].split()[1]
        found.append(Question(number, 2, None, None, ANSWERS["colour"].index(colour)))
        if len(there) > 1:
            (y, x), (other_y, other_x) = (_centre(groups[c]) for c in there[:2])
            sideways = abs(x - other_x) >= abs(y - other_y)
            for first, second, after in (
                (0, 1, x >= other_x if sideways else y >= other_y),
                (1, 0, x < other_x if sideways else y < other_y),
            ):
                answer = int(after) + (0 if sideways else 2)
                found.append(Question(number, 3, int(there[first]), int(there[second]), answer))
    return tuple(found)


def _centre(items: list) -> tuple[float, float]:
    """Return `(y, x)`, the mean over the things of one category."""
    boxes = np.array([item.box for item in items], np.float64)
    x, y = (boxes[:, :2] + boxes[:, 2:] / 2).mean(0)
    return y, x


class Answerer(nn.Module):
    """A model that looks among the cells for the things in a question. It answers from what it finds, how much of it
    there is, where it is, and the mean of all cells."""

    def __init__(self, channels: int, words: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(channels, WIDTH), nn.Linear(channels, WIDTH)
        self.query = nn.Linear(words, WIDTH)
        self.place = nn.Parameter(torch.zeros(regions.GRID**2, WIDTH))
        self.kind = nn.Embedding(len(KINDS), WIDTH)
        self.hidden = nn.Linear(4 * WIDTH + 8, 2 * WIDTH)
        line = torch.linspace(-1, 1, regions.GRID)
        self.register_buffer("places", torch.cartesian_prod(line, line))  # (y, x)
        self.answers = nn.Linear(2 * WIDTH, sum(len(answers) for answers in ANSWERS.values()))
        starts = np.cumsum([0, *(len(answers) for answers in ANSWERS.values())])
        allowed = torch.zeros(len(KINDS), starts[-1], dtype=torch.bool)
        for kind, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            allowed[kind, start:stop] = True
        self.register_buffer("allowed", allowed)

    def forward(self, cells: torch.Tensor, kind: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return scores `[S, Q, answers]`. They are -inf for what is no answer to the question.

        Args:
            cells: `[S, P, C]`.
            kind: of each scene's questions `[S, Q]`.
            words: embeddings of the things in the questions `[S, Q, 2, W]`, 0 where there is none.
        """
        keys, values = self.keys(cells), F.relu(self.values(cells)) + self.place
        looked = self.query(words).flatten(1, 2) @ keys.mT / WIDTH**0.5
        weights = looked.softmax(-1)
        by_question = (
            weights @ values,
            weights @ self.places,
            looked.sigmoid().mean(-1, keepdim=True),
            looked.amax(-1, keepdim=True),
        )
        found, where, amount, most = (each.unflatten(1, (-1, 2)).flatten(2) for each in by_question)
        whole = values.mean(1, keepdim=True).expand(-1, kind.shape[1], -1)
        seen = torch.cat((found, whole, self.kind(kind), where, amount, most), 2)
        scores = self.answers(F.relu(self.hidden(seen)))
        return scores.masked_fill(~self.allowed[kind], -torch.inf)


class Asked:
    """The questions of a part as tensors, on the scenes' cells `[N, P, C]`, with embeddings of the categories.

    The questions of a scene `[N, Q]` are padded to the largest number. `there` says which are questions.
    """

    def __init__(self, part: str, cells: torch.Tensor, names: torch.Tensor, starts: torch.Tensor) -> None:
        by_scene: list[list[Question]] = [[] for _ in range(len(cells))]
        for question in questions(part):
            by_scene[question.scene].append(question)
        self.cells = cells
        self.there = _filled([[True] * len(each) for each in by_scene], False)
        self.kind = _filled([[q.kind for q in each] for each in by_scene], 0)
        answer = _filled([[q.answer for q in each] for each in by_scene], 0)
        self.answer = answer + starts[self.kind]
        table = torch.cat((names, torch.zeros(1, names.shape[1])))
        things = [[[-1 if c is None else c for c in (q.first, q.second)] for q in each] for each in by_scene]
        self.words = table[_filled(things, [-1, -1])]

    def loss(self, model: Answerer, scenes: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy. Every kind of question has the same weight, as in the metric."""
        there, kind = self.there[scenes], self.kind[scenes]
        scores = model(self.cells[scenes], kind, self.words[scenes])
        losses = F.cross_entropy(scores.flatten(0, 1), self.answer[scenes].flatten(), reduction="none")
        asked = torch.bincount(kind[there], minlength=len(KINDS))
        weights = there / asked.clamp(min=1)[kind]
        return (weights.flatten() * losses).sum() / (asked > 0).sum()

    @torch.no_grad()
    def right(self, model: Answerer) -> torch.Tensor:
        """Whether each question is answered correctly `[questions]`, in order."""
        found = []
        for scenes in torch.arange(len(self.cells)).split(BATCH):
            scores = model(self.cells[scenes], self.kind[scenes], self.words[scenes])
            found.append((scores.argmax(2) == self.answer[scenes])[self.there[scenes]])
        return torch.cat(found)

    @property
    def kinds(self) -> torch.Tensor:
        """The kind of each question `[questions]`, in order."""
        return self.kind[self.there]


def _filled(rows: list[list], empty) -> torch.Tensor:
    """Return rows of different lengths as a tensor, padded with `empty` to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [empty] * (longest - len(row)) for row in rows])


def trained(train: Asked, validation: Asked, seed: int) -> Answerer:
    """Train a model and return its state after the epoch that answers the validation split best."""
    torch.manual_seed(seed)
    model = Answerer(train.cells.shape[2], train.words.shape[3])
    readout_training.train(
        model,
        lambda scenes, epoch: train.loss(model, scenes),
        len(train.cells),
        epochs=EPOCHS,
        batch=BATCH,
        rate=RATE,
        weight_decay=WEIGHT_DECAY,
        quality=lambda: by_kind(validation.right(model).double(), validation.kinds),
    )
    return model


def by_kind(right: torch.Tensor, kind: torch.Tensor) -> float:
    """Return the mean over kinds of the accuracy."""
    return float(np.mean([right[kind == k].mean() for k in kind.unique()]))


@register
class VqaScenes(Benchmark):
    """Items are scenes. Columns are correct answers by kind and questions by kind."""

    name, family = "vqa scenes", "vqa"
    metric = "accuracy, mean over presence, count, colour, relation"
    quick_seeds = 1
    readout_seconds = 17
    version = 3
    item_set = unseen.ITEMS

    def images(self, seed: int) -> Mapping[str, Images]:
        return unseen.readout_images(self.context.split)

    def asked(self, tower: FeatureStore, images: Mapping[str, Images]) -> list[Asked]:
        """Return the questions of training, validation and test."""
        cells = regions.standardised_cells(tower, images)
        names = tower.text([f"a picture of {name}" for name in unseen.categories()])
        names = F.normalize(names - names.mean(0), dim=1) * names.shape[1] ** 0.5
        starts = torch.tensor(np.cumsum([0, *(len(answers) for answers in ANSWERS.values())])[:-1])
        parts = unseen.parts(self.context.split).items()
        return [Asked(part, cells[name], names, starts) for name, part in parts]

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        train, validation, test = self.asked(tower, images)
        starts = range(STARTS * seed, STARTS * (seed + 1))
        right = [test.right(trained(train, validation, start)).double() for start in starts]
        return tallied(self.context.split, torch.stack(right).mean(0).numpy())

    def figure(self, means: np.ndarray) -> np.ndarray:
        right, asked = np.split(means, 2, axis=-1)
        there = asked > 0
        return (right / np.where(there, asked, 1)).sum(-1) / there.sum(-1)

    def baselines(self) -> dict[str, float]:
        return {
            "chance": float(np.mean([1 / len(answers) for answers in ANSWERS.values()])),
            "text only": float(self.figure(tallied(self.context.split, guessed(self.context.split)).mean(0))),
        }


def tallied(part: str, right: np.ndarray) -> np.ndarray:
    """Return the numbers of correct answers and of questions by scene and kind `[N, 2 * kinds]`.

    Args:
        right: whether each question was answered correctly, or its share of correct answers.
    """
    found = np.zeros((len(unseen.scenes(part)), 2 * len(KINDS)))
    for question, good in zip(questions(part), right, strict=True):
        found[question.scene, question.kind] += good
        found[question.scene, len(KINDS) + question.kind] += 1
    return found


def guessed(part: str) -> np.ndarray:
    """Whether each question is answered correctly without the image, by the most frequent training answer to its kind
    and first thing."""
    by_thing, by_kind_ = {}, {}
    for q in questions("train"):
        for table, key in ((by_thing, (q.kind, q.first)), (by_kind_, q.kind)):
            table.setdefault(key, np.zeros(len(ANSWERS[KINDS[q.kind]])))[q.answer] += 1
    right = []
    for q in questions(part):
        overall = by_kind_[q.kind] / by_kind_[q.kind].sum()
        right.append(np.argmax(by_thing.get((q.kind, q.first), 0) + PRIOR * overall) == q.answer)
    return np.array(right)
