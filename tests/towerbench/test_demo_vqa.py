"""Questions on scenes: right answers, exact features reach the top, other scenes' are at what can be guessed."""

import re

import numpy as np
import pytest
import torch
from oracle import Oracle

from demoworld import unseen_things
from towerbench import Context, report
from towerbench.demo import regions, unseen, vqa


@pytest.fixture(scope="module", autouse=True)
def few():
    """Five things, so that few scenes show each of them often."""
    caches = (unseen.cast, unseen.scenes, regions.objects, vqa.questions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unseen_things, "_THINGS", unseen_things._THINGS[:5])
        patch.setattr(unseen, "COUNTS", {"train": 400, "validation": 40, "test": 60, "development": 24})
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def test_questions_are_as_a_scenes_objects_and_captions_say():
    scenes, seen = unseen.scenes("test"), set()
    for question in vqa.questions("test"):
        scene, kind = scenes[question.scene], vqa.KINDS[question.kind]
        answer = vqa.ANSWERS[kind][question.answer]
        of_first = [o for o in scene.objects if o.category == question.first]
        seen.add((kind, answer))
        if kind == "presence":
            assert bool(of_first) == (answer == "yes")
        elif kind == "count":
            assert answer == ["one", "two", "three", "four or more"][min(len(of_first), 4) - 1]
        elif kind == "colour":
            assert scene.captions[2].endswith(f" {answer} background") and "background" in str(question)
        else:
            second = [o for o in scene.objects if o.category == question.second]
            across, down = (
                np.mean([[o.box[0] + o.box[2] / 2, o.box[1] + o.box[3] / 2] for o in group], axis=0)
                for group in (of_first, second)
            )
            offset = across - down  # the first thing's centre less the second's
            axis = int(abs(offset[1]) > abs(offset[0]))
            names = (("left", "right"), ("above", "below"))[axis]
            assert answer == names[int(offset[axis] > 0)], question
    assert {kind for kind, _ in seen} == set(vqa.KINDS) and len(seen) > 14
    yes = [q.answer for q in vqa.questions("test") if q.kind == 0]
    assert np.mean(yes) == 0.5  # as often there as not
    relations = [str(q) for q in vqa.questions("test") if q.kind == 3]
    assert re.fullmatch(r"on which side of [\w ]+ is [\w ]+\?", relations[0])


def test_exact_features_answer_and_those_of_other_scenes_do_not(monkeypatch):
    monkeypatch.setattr(vqa, "BATCH", 20)
    monkeypatch.setattr(vqa, "RATE", 4e-3)
    benchmark = vqa.VqaScenes(Context())
    train, validation, test = benchmark.asked(Oracle(), benchmark.images(0))
    model = vqa.trained(train, validation, 0)

    def shares():
        found = vqa.tallied("test", test.right(model).numpy())
        return dict(zip(vqa.KINDS, found[:, :4].sum(0) / found[:, 4:].sum(0), strict=True))

    right = shares()
    assert right["presence"] > 0.9 and right["relation"] > 0.6, right
    assert right["colour"] < 0.35, right  # which the oracle does not tell
    test.cells = test.cells.roll(7, 0)
    other = shares()
    assert other["presence"] < 0.65 and other["relation"] < 0.5, other


def test_a_question_is_answered_as_alone_however_many_its_scene_has():
    benchmark = vqa.VqaScenes(Context())
    _, _, test = benchmark.asked(Oracle(), benchmark.images(0))
    torch.manual_seed(0)
    model = vqa.Answerer(test.cells.shape[2], test.words.shape[3]).eval()
    counts = test.there.sum(1)
    assert counts.min() < counts.max() == test.there.shape[1]
    assert test.kinds.tolist() == [q.kind for q in vqa.questions("test")]
    together, alone = test.right(model), []
    for scene, place in test.there.nonzero().tolist():
        asked = test.kind[scene, place].view(1, 1), test.words[scene, place].view(1, 1, 2, -1)
        alone.append(model(test.cells[scene : scene + 1], *asked).argmax() == test.answer[scene, place])
    assert torch.stack(alone).float().mean() > 0 and torch.equal(torch.stack(alone), together)
    loss = test.loss(model, torch.arange(9))
    test.words[~test.there] = 7.0
    assert test.loss(model, torch.arange(9)) == loss


def test_what_can_be_answered_without_an_image():
    found = vqa.VqaScenes(Context()).baselines()
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 11 + 1 / 4) / 4)
    assert found["chance"] - 0.05 < found["text only"] < 0.6
    presence = [g for g, q in zip(vqa.guessed("test"), vqa.questions("test"), strict=True) if q.kind == 0]
    assert 0.3 < np.mean(presence) < 0.7


def test_a_tower_against_itself_has_the_same_figures(against_itself, monkeypatch):
    monkeypatch.setattr(unseen, "COUNTS", {"train": 24, "validation": 6, "test": 12, "development": 6})
    monkeypatch.setattr(vqa, "EPOCHS", 2)
    unseen.scenes.cache_clear()
    vqa.questions.cache_clear()
    results = against_itself(vqa.VqaScenes, seeds=2)
    assert set(results["benchmarks"][0]["baselines"]) == {"chance", "text only"}
    assert "Without a tower, vqa scenes: chance 27.3, text only" in report.markdown(results)
    unseen.scenes.cache_clear()
    vqa.questions.cache_clear()
