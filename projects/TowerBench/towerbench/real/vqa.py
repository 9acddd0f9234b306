"""VQAv2 and OK-VQA. A readout on the map and the question's text embedding chooses one of the frequent answers."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from towerbench import readout_training
from towerbench.dense_maps import grid_cells
from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.real import questions, sources
from towerbench.real.questions import Asked
from towerbench.registry import variant
from towerbench.standardise import standardised

TRAIN, TEST = 9000, 5000
"""Number of images of train2014 that the readout sees, and of val2014 that are asked about. They are spread over the
set, always the same, and come with all their questions."""

HELD = 9
"""One of this number of the former images is in the validation split."""

ANSWERS = 3000
"""Number of the most frequent training answers, among which the readout chooses."""

GRID = 8
"""Images are seen in GRID x GRID cells."""

EPOCHS, BATCH, RATE, WIDTH = 12, 64, 1e-3, 256
WEIGHT_DECAY = 0.05
GLIMPSES = 2


class Answerer(nn.Module):
    """A model that looks twice among the cells for what a question mentions. It answers from what it finds, how much of
    it there is, where it is, the mean of all cells, and the question itself."""

    def __init__(self, channels: int, words: int, answers: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(channels, WIDTH), nn.Linear(channels, WIDTH)
        self.query, self.question = nn.Linear(words, GLIMPSES * WIDTH), nn.Linear(words, WIDTH)
        self.place = nn.Parameter(torch.zeros(GRID**2, WIDTH))
        line = torch.linspace(-1, 1, GRID)
        self.register_buffer("places", torch.cartesian_prod(line, line))  # (y, x)
        self.hidden = nn.Linear((GLIMPSES + 2) * WIDTH + 4 * GLIMPSES, 2 * WIDTH)
        self.answers = nn.Linear(2 * WIDTH, answers)

    def forward(self, cells: torch.Tensor, image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return scores `[Q, answers]`.

        Args:
            cells: `[N, P, C]`.
            image: index of each question's image `[Q]`.
            words: embedding of each question `[Q, W]`.
        """
        keys, values = self.keys(cells), F.relu(self.values(cells)) + self.place
        queries = self.query(words).unflatten(1, (GLIMPSES, WIDTH))
        looked = torch.einsum("qgw,qpw->qgp", queries, keys[image]) / WIDTH**0.5
        weights = looked.softmax(-1)
        found = torch.einsum("qgp,qpw->qgw", weights, values[image]).flatten(1)
        where = (weights @ self.places).flatten(1)
        amounts = torch.cat((looked.sigmoid().mean(-1), looked.amax(-1)), 1)
        asked = F.relu(self.question(words))
        seen = torch.cat((found, values.mean(1)[image], asked, where, amounts), 1)
        return self.answers(F.relu(self.hidden(seen)))


@dataclass
class Side:
    """Questions as tensors.

    Args:
        cells: `[N, P, C]`, in half precision.
        words: of each question `[Q, W]`.
        first: index of the first question of each image, and the end of all questions `[N + 1]`.
        worth: for each question the scores of answers, sparse: indices of answers `[k]` and their scores `[k]`.
    """

    cells: torch.Tensor
    words: torch.Tensor
    first: torch.Tensor
    worth: list[tuple[torch.Tensor, torch.Tensor]]

    def scores(self, model: Answerer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of all questions on some images, and what the answers are worth, both `[q, answers]`."""
        rows = [torch.arange(self.first[p], self.first[p + 1]) for p in images.tolist()]
        within = torch.cat([torch.full((len(r),), place) for place, r in enumerate(rows)])
        row = torch.cat(rows)
        found = model(self.cells[images].float(), within, self.words[row])
        worth = torch.zeros_like(found)
        for target, number in zip(worth, row.tolist(), strict=True):
            target[self.worth[number][0]] = self.worth[number][1]
        return found, worth

    @torch.no_grad()
    def accuracy(self, model: Answerer) -> float:
        """Return the mean worth of the chosen answers."""
        total = 0.0
        for images in torch.arange(len(self.cells)).split(BATCH):
            found, worth = self.scores(model, images)
            total += float(worth.gather(1, found.argmax(1, keepdim=True)).double().sum())
        return total / len(self.words)


def trained(train: Side, held: Side, answers: int, seed: int) -> Answerer:
    """Train a model and return its state after the epoch that answers the validation split best.

    The loss is the binary cross-entropy with the worth of the answers, summed over them (arXiv:1708.02711, section
    3.5).
    """
    torch.manual_seed(seed)
    model = Answerer(train.cells.shape[2], train.words.shape[1], answers)

    def loss(images: torch.Tensor, epoch: int) -> torch.Tensor:
        found, worth = train.scores(model, images)
        return F.binary_cross_entropy_with_logits(found, worth, reduction="sum") / len(found)

    readout_training.train(
        model,
        loss,
        len(train.cells),
        epochs=EPOCHS,
        batch=BATCH,
        rate=RATE,
        weight_decay=WEIGHT_DECAY,
        quality=lambda: held.accuracy(model),
    )
    return model


class Vqa(sources.RealBenchmark):
    """Items are images. Columns are the total worth of the answers to their questions, and the number of questions.

    The benchmark is in-domain: the images are COCO's, and train2017, which fine-tuning sees, has train2014 and most of
    val2014.
    """

    family, metric = "vqa", "VQA's soft accuracy, a readout's choice of frequent answers"
    in_domain = True
    version = 2

    @functools.cached_property
    def asked(self) -> dict[str, Asked]:
        """The questions to train on (`train`), to choose by (`held`), and of the `test`."""
        train_questions, train_annotations, test_questions, test_annotations, *_ = map(self.path, self.needs)
        whole = questions.read(train_questions, train_annotations, TRAIN)
        if len(whole.images) < 2:
            raise DataError(
                f"{train_questions}: asks about {len(whole.images)} image; at least 2 are needed to train "
                "and to choose"
            )
        train, held = sources.train_and_held(range(len(whole.images)), HELD)
        return {
            "train": whole.part(train),
            "held": whole.part(held),
            "test": questions.read(test_questions, test_annotations, TEST),
        }

    def images(self, seed: int) -> Mapping[str, Images]:
        *files, train, test = map(self.path, self.needs)
        folders = {"train": train, "held": train, "test": test}
        return {
            part: sources.images(
                [sources.Source(coco_image(folders[part], number)) for number in asked.images],
                f"{self.name}, {part}",
                annotations=files,
                fit="squash",
                dense=True,
            )
            for part, asked in self.asked.items()
        }

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        answers = questions.most_frequent(self.asked["train"].every, ANSWERS)
        train, held, test = self.sides(tower, images, answers)
        model = trained(train, held, len(answers), seed)
        found = []
        with torch.no_grad():
            for number, asked in enumerate(self.asked["test"].questions):
                chosen = test.scores(model, torch.tensor([number]))[0].argmax(1)
                each = [q.scores.get(answers[c], 0.0) for q, c in zip(asked, chosen.tolist(), strict=True)]
                found.append((sum(each), len(each)))
        return np.array(found, np.float64)

    def sides(self, tower: FeatureStore, images: Mapping[str, Images], answers: list[str]) -> list[Side]:
        """Return `train`, `held` and `test`. Their features are standardised by channel, like those of `train`."""
        seen = standardised(lambda of: grid_cells(tower, of, GRID), images["train"], channels=2)
        centre = tower.text([q.text for q in self.asked["train"].every]).mean(0)
        place = {answer: number for number, answer in enumerate(answers)}
        found = []
        for name, asked in self.asked.items():
            every = asked.every
            words = tower.text([question.text for question in every]) - centre
            words = F.normalize(words, dim=1) * words.shape[1] ** 0.5
            first = torch.tensor([0, *(len(several) for several in asked.questions)]).cumsum(0)
            known = [[(place[a], s) for a, s in q.scores.items() if a in place] for q in every]
            worth = [
                (torch.tensor([p for p, _ in each], dtype=torch.int64), torch.tensor([s for _, s in each]))
                for each in known
            ]
            cells = torch.cat([part.half() for part in seen(images[name])])
            found.append(Side(cells, words, first, worth))
        return found

    def figure(self, means: np.ndarray) -> np.ndarray:
        return means[..., 0] / means[..., 1]

    def baselines(self) -> dict[str, float]:
        train, test = self.asked["train"].every, self.asked["test"].every
        best = questions.most_frequent(train, 1)
        return {
            "most frequent answer": questions.worth(test, best * len(test)),
            "question alone": questions.worth(test, questions.guessed(train, test)),
        }


def coco_image(folder: Path, number: int) -> Path:
    """Return an image of COCO's train2014 or val2014: in that folder, or under its name of 2017 in train2017 or
    val2017."""
    if folder.name.endswith("2014"):
        return folder / f"COCO_{folder.name}_{number:012d}.jpg"
    held = folder.parent / "val2017" / f"{number:012d}.jpg"
    return held if held.exists() else folder.parent / "train2017" / held.name


def _declare(name: str, folder: str, prefix: str, about: str) -> None:
    needs = {}
    for split in ("train2014", "val2014"):
        needs[f"{folder}/{prefix}OpenEnded_mscoco_{split}_questions.json"] = f"{about}'s questions"
        needs[f"{folder}/{prefix}mscoco_{split}_annotations.json"] = f"{about}'s answers"
    needs["coco/train2014|coco/train2017"] = "COCO's images train2014, or train2017 and val2017"
    needs["coco/val2014|coco/val2017"] = "COCO's images val2014, or train2017 and val2017"
    variant(Vqa, f"vqa {name}", f"{about}.", needs=needs)


_declare("vqav2", "vqav2", "v2_", "VQAv2")
_declare("ok-vqa", "okvqa", "", "OK-VQA")
