"""VQAv2 and OK-VQA, on tiny files of the true format."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from towerbench.errors import DataError
from towerbench.real import questions, vqa

COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


def write(root: Path, prefix="v2_", folder="vqav2", counts=(54, 12), year=2014) -> None:
    """Images of one colour with a bar on the left or right; on each is asked which, and where it is."""
    for split, count, start in (("train2014", counts[0], 0), ("val2014", counts[1], 1000)):
        asked, annotated = [], []
        for i in range(count):
            number, rng = start + 7 * i + 1, np.random.default_rng(start + i)
            name, side = list(COLOURS)[i % 3], i // 3 % 2
            pixels = np.array(COLOURS[name]) + rng.integers(-30, 30, (48, 64, 3))
            pixels[:, 40 * side : 40 * side + 16] = 255
            where = root / "coco" / (split if year == 2014 else f"{split[:-4]}2017")
            where.mkdir(parents=True, exist_ok=True)
            file = f"COCO_{split}_{number:012d}.jpg" if year == 2014 else f"{number:012d}.jpg"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(where / file)
            for k, (text, answer) in enumerate(
                (("What color is the image?", name), ("Where is the bar?", ("left", "right")[side]))
            ):
                both = {"image_id": number, "question_id": 1000 * number + k}
                asked.append(both | {"question": text})
                answers = [
                    {"answer": each, "answer_confidence": "yes", "answer_id": place}
                    for place, each in enumerate([answer] * 8 + ["unclear"] * 2, 1)
                ]
                kinds = {"question_type": "what", "answer_type": "other", "multiple_choice_answer": answer}
                annotated.append(both | kinds | {"answers": answers})
        about = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": split, "license": {}}
        (root / folder).mkdir(parents=True, exist_ok=True)
        for kind, content in (
            (f"OpenEnded_mscoco_{split}_questions", {"task_type": "Open-Ended", "questions": asked}),
            (f"mscoco_{split}_annotations", {"annotations": annotated}),
        ):
            (root / folder / f"{prefix}{kind}.json").write_text(json.dumps(about | content))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write(root)
    return root


def test_soft_accuracy_by_hand():
    # Of ten people; 1 of 10: nine times one of three (the tenth time its own is left out).
    by_hand = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 7: 1.0, 10: 1.0}
    for matches, expected in by_hand.items():
        assert questions.soft_accuracy(matches, 10) == pytest.approx(expected), matches
    given = ["red"] * 3 + ["dark red"] * 2 + ["maroon"] + ["brown"] * 4
    found = questions.scores(given)
    assert found == pytest.approx({"red": 0.9, "dark red": 0.6, "maroon": 0.3, "brown": 1.0})
    # As the definition has it, subset by subset.
    for answer in set(given):
        subsets = itertools.combinations(given, 9)
        assert found[answer] == pytest.approx(np.mean([min(s.count(answer) / 3, 1) for s in subsets]))


def test_answers_are_compared_without_punctuation_articles_and_case():
    by_hand = {
        "The Dog.": "dog",
        "two": "2",
        "None": "0",
        "1,000": "1000",
        "2.5": "2.5",
        "black/white": "black white",
        "black, white": "black white",
        "t-shirt": "t shirt",
        "don't": "don't",
        " a  cat\n": "cat",
        "yes!": "yes",
    }
    assert {answer: questions.normalised(answer) for answer in by_hand} == by_hand
    assert questions.scores(["A dog", "dog", "the dog", "two"]) == pytest.approx(
        {"dog": (3 * 2 / 3 + 1) / 4, "2": (3 * 1 / 3) / 4}
    )


def test_files_are_read(data):
    files = [
        data / f"vqav2/v2_{kind}.json"
        for kind in ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations")
    ]
    whole, few = questions.read(*files, 100), questions.read(*files, 5)
    assert whole.images == [1001 + 7 * i for i in range(12)] and len(whole.every) == 24
    first, second = whole.questions[4]
    assert first.text == "What color is the image?" and first.scores == {"green": 1.0, "unclear": 0.6}
    assert second.scores["right"] == 1.0
    assert len(few.images) == 5 and set(few.images) < set(whole.images)


def test_images_are_found_under_their_names_of_both_years(data, tmp_path, of):
    assert vqa.coco_image(data / "coco/val2014", 1001).is_file()
    write(tmp_path, "", "okvqa", (4, 3), 2017)
    benchmark = of("vqa ok-vqa", tmp_path)
    assert benchmark.missing(benchmark.context) is None and benchmark.in_domain
    assert len(list(benchmark.images(0)["test"].make())) == 3
    moved = tmp_path / "coco/val2017/000000001001.jpg"
    moved.rename(tmp_path / "coco/train2017" / moved.name)
    assert vqa.coco_image(moved.parent, 1001).parent.name == "train2017"


def test_without_an_image_by_hand(of):
    def question(text, **scores):
        return questions.Question(text, scores)

    train = [question("What color is the car?", red=1.0, blue=0.3)] * 3
    train += [question("What color is the sky?", blue=1.0)] * 2 + [question("Is it day?", yes=1.0)] * 4
    # In sum yes is worth 4, red 3, blue 2.9.
    assert questions.most_frequent(train, 2) == ["yes", "red"]
    test = [
        question("What color is the cat?", red=0.6),  # five questions begin with `what color is the`: red
        question("Is it night?", no=1.0, yes=0.3),  # four begin so, which is too few: yes, as everywhere
    ]
    assert questions.guessed(train, test) == ["red", "yes"]
    assert questions.worth(test, ["red", "yes"]) == pytest.approx(0.45)
    found = of("vqa vqav2").baselines()
    # `unclear` is worth 0.6 to each; half of the questions on the bar have either side.
    assert found == pytest.approx({"most frequent answer": 0.6, "question alone": 0.6})


def test_the_readout_answers_from_the_image_and_not_from_others(run, monkeypatch):
    monkeypatch.setattr(vqa, "EPOCHS", 40)
    monkeypatch.setattr(vqa, "BATCH", 12)
    benchmark, scores = run("vqa vqav2")
    assert scores.shape == (12, 2) and (scores[:, 1] == 2).all()
    assert benchmark.figure(scores.mean(0)) > 0.85, scores
    assert np.array_equal(scores, run("vqa vqav2")[1])
    sides = vqa.Vqa.sides

    def turned(*given):
        train, held, test = sides(*given)
        test.cells = test.cells.roll(5, 0)
        return train, held, test

    monkeypatch.setattr(vqa.Vqa, "sides", turned)
    other = benchmark.figure(run("vqa vqav2")[1].mean(0))
    assert other < 0.7, other


def test_accuracy_counts_answers_that_the_readout_does_not_know(run, monkeypatch):
    monkeypatch.setattr(vqa, "EPOCHS", 1)
    monkeypatch.setattr(vqa, "ANSWERS", 1)
    benchmark, scores = run("vqa vqav2")
    assert questions.most_frequent(benchmark.asked["train"].every, 1) == ["unclear"]
    assert benchmark.figure(scores.mean(0)) == pytest.approx(0.6)  # it can only say `unclear`


def test_the_whole_suite(data, command, monkeypatch):
    monkeypatch.setattr(vqa, "EPOCHS", 2)
    results, rows = command(data, "vqa vqav2,vqa ok-vqa")
    (family,), (row,) = results["families"], rows.values()
    assert row["in_domain"] and family["in_domain"] and results["mean"] is None and row["n"] == 12
    assert row["baselines"] == {"most frequent answer": 60, "question alone": 60}
    assert "okvqa/OpenEnded_mscoco_train2014_questions.json" in results["left_out"]["vqa ok-vqa"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: a["annotations"].pop(0), "has no annotation of question 1001000"),
        (lambda q, a: q["questions"].pop(0), "question 1001000 on image 1001 is not in"),
        (lambda q, a: a["annotations"][0].update(image_id=5), "on image 5 is not in"),
        (
            lambda q, a: a["annotations"].append(a["annotations"][0]),
            "s.json: question 1001000 is there twice",
        ),
        (lambda q, a: q["questions"].append(q["questions"][0]), "ns.json: question 1001000 is there twice"),
        (lambda q, a: a["annotations"][0].update(answers=[]), "has 0 answers"),
        (lambda q, a: a["annotations"][0].update(answers=[{"id": 1}] * 10), "no usable `answer`"),
        (lambda q, a: q["questions"][0].pop("question"), "no usable `question`"),
        (lambda q, a: a.pop("annotations"), "no usable `annotations`"),
        (lambda q, a: q.update(questions=[]), "has no question"),
    ],
)
def test_broken_files_are_refused(data, tmp_path, change, message):
    kinds = {"questions": "OpenEnded_mscoco_val2014_questions", "annotations": "mscoco_val2014_annotations"}
    content = [json.loads((data / f"vqav2/v2_{name}.json").read_text()) for name in kinds.values()]
    change(*content)
    files = [tmp_path / f"{kind}.json" for kind in kinds]
    for file, each in zip(files, content, strict=True):
        file.write_text(json.dumps(each))
    with pytest.raises(DataError, match=message):
        questions.read(*files, 100)


def test_images_that_are_not_there_are_named(tmp_path, of):
    write(tmp_path, counts=(3, 2))
    next((tmp_path / "coco/val2014").iterdir()).unlink()
    with pytest.raises(DataError, match="COCO_val2014_0000000010.*no such file"):
        of("vqa vqav2", tmp_path).images(0)
    write(tmp_path, counts=(1, 2))
    with pytest.raises(DataError, match="asks about 1 image"):
        of("vqa vqav2", tmp_path).images(0)
