"""Questions on unseen scenes: is there one, how many, which colour, which side. Answered from the map of features."""

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
"""Models that are trained; scores are their mean. The start alone moves the accuracy by some 2 points."""
PRIOR = 5.0
"""Weight, in questions, of a kind's answers against those on one thing, where answers are guessed without an image."""


@dataclass(frozen=True)
class Question:
    """A question on a scene.

    Args:
        scene: number in its part.
        kind: number in KINDS.
        first, second: categories asked about; None where the kind asks for none.
        answer: number in ANSWERS of its kind.
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
    """Of every scene: of one thing that is there and one that is not, whether it is; how many; which colour; and where
    there are two kinds of things, how they lie, asked both ways."""
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
        most = max(there, key=lambda c: (len(groups[c]), c))  # or `one` would be nearly every answer
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
    """`(y, x)`, the mean over things of one category."""
    boxes = np.array([item.box for item in items], np.float64)
    x, y = (boxes[:, :2] + boxes[:, 2:] / 2).mean(0)
    return y, x


class Answerer(nn.Module):
    """Looks for the things that a question names among the cells, and answers from what it finds, how much of it there
    is, where, and the mean of all cells."""

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
        """Cells `[S, P, C]`, and of each scene's questions the kind `[S, Q]` and the embeddings of the things
        `[S, Q, 2, W]` (0 where there is none) -> scores `[S, Q, answers]`, -inf where the answer is none to the
        question."""
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
    """The questions of a part in tensors, on the scenes' cells `[N, P, C]`, with embeddings of the categories.

    A scene's questions `[N, Q]` are filled up to the most that one has; `there` says which are questions.
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
        """Cross-entropy, every kind of question with the same weight, as it has in the figure."""
        there, kind = self.there[scenes], self.kind[scenes]
        scores = model(self.cells[scenes], kind, self.words[scenes])
        losses = F.cross_entropy(scores.flatten(0, 1), self.answer[scenes].flatten(), reduction="none")
        asked = torch.bincount(kind[there], minlength=len(KINDS))
        weights = there / asked.clamp(min=1)[kind]
        return (weights.flatten() * losses).sum() / (asked > 0).sum()

    @torch.no_grad()
    def right(self, model: Answerer) -> torch.Tensor:
        """Whether each question is answered right `[questions]`, in order."""
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
    """Rows of different lengths, filled up with `empty` to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [empty] * (longest - len(row)) for row in rows])


def trained(train: Asked, validation: Asked, seed: int) -> Answerer:
    """The model after the epoch that answers the validation split best."""
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
    """The mean over kinds of the accuracy."""
    return float(np.mean([right[kind == k].mean() for k in kind.unique()]))


@register
class VqaScenes(Benchmark):
    """Items are scenes, columns right answers by kind and questions by kind."""

    name, family = "vqa scenes", "vqa"
    metric = "accuracy, mean over presence, count, colour, relation"
    quick_seeds = 1
    readout_seconds = 17
    version = 3
    item_set = unseen.ITEMS

    def images(self, seed: int) -> Mapping[str, Images]:
        return unseen.readout_images(self.context.split)

    def asked(self, tower: FeatureStore, images: Mapping[str, Images]) -> list[Asked]:
        """The questions of training, validation and test."""
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
    """Right answers and questions by scene and kind `[N, 2 * kinds]`.

    Args:
        right: of each question, whether it was answered right, or how often of several times.
    """
    found = np.zeros((len(unseen.scenes(part)), 2 * len(KINDS)))
    for question, good in zip(questions(part), right, strict=True):
        found[question.scene, question.kind] += good
        found[question.scene, len(KINDS) + question.kind] += 1
    return found


def guessed(part: str) -> np.ndarray:
    """Whether the answer that training has most often to a question's kind and first thing is right: what can be
    answered without the image."""
    by_thing, by_kind_ = {}, {}
    for q in questions("train"):
        for table, key in ((by_thing, (q.kind, q.first)), (by_kind_, q.kind)):
            table.setdefault(key, np.zeros(len(ANSWERS[KINDS[q.kind]])))[q.answer] += 1
    right = []
    for q in questions(part):
        overall = by_kind_[q.kind] / by_kind_[q.kind].sum()
        right.append(np.argmax(by_thing.get((q.kind, q.first), 0) + PRIOR * overall) == q.answer)
    return np.array(right)
