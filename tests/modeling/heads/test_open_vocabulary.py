"""Proposals named by the text encoder: the score, duplicates, the order of names, and what is refused."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from visft import model_zoo
from visft.classes.open_names import OpenNames, read_names
from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT
from visft.modeling.heads import HeadInputs
from visft.modeling.open_vocabulary import (
    OpenVocabulary,
    best_of_each,
    build_open_vocabulary,
    distinct,
    overlaps,
)

SIZE = (64, 64)
WORDS = ("dog", "traffic light", "bird", "cup")
IMAGES = [{"height": 64, "width": 64}]
OBJECTNESS = torch.tensor([0.9, 0.8, 0.4])


class Proposer(torch.nn.Module):
    """Three proposals: the second repeats the first but for one column of pixels."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks = masks

    def proposals(self, inputs=None) -> list[Instances]:
        boxes = torch.tensor([[4.0, 4, 40, 40], [4, 4, 39, 40], [30, 30, 60, 56]])
        found = Instances(SIZE, pred_boxes=Boxes(boxes), objectness=OBJECTNESS)
        if self.masks:
            found.pred_masks = torch.zeros(3, *SIZE, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(found.pred_masks, boxes.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
        return [found]


@pytest.fixture(scope="module")
def tower() -> CLIPViT:
    return CLIPViT.from_open_clip("visft-tiny", "demo").eval()


def vocabulary(tower: CLIPViT, names=WORDS, **options) -> OpenVocabulary:
    found = OpenVocabulary(read_names("NAMES", names), **options)
    found.bind(tower)
    return found


def named(words: OpenVocabulary, masks: bool = True) -> Instances:
    features = torch.randn(1, 192, 8, 8, generator=torch.Generator().manual_seed(1))
    return words.inference(Proposer(masks), HeadInputs(features, None, IMAGES, [SIZE], SIZE))[0]


@pytest.mark.parametrize("masks", [True, False])
def test_score_is_its_formula(tower, masks):
    words = vocabulary(tower, objectness_power=0.4, text_power=0.7, logit_scale=20.0)
    found = named(words, masks)
    features = torch.randn(1, 192, 8, 8, generator=torch.Generator().manual_seed(1))
    (region,) = words.text.inference(HeadInputs(features, None, IMAGES, [SIZE], SIZE))
    (proposed,) = Proposer(masks).proposals()
    embedded = region.embeddings(proposed.pred_masks if masks else proposed.pred_boxes)
    texts = words.text.class_text([(name,) for name in (*WORDS, "background")]).embeddings
    probability = (20 * embedded @ texts.T).softmax(-1)[:, :4]
    expected = OBJECTNESS[:, None] ** 0.4 * probability**0.7
    assert len(found) == 8  # of three proposals with four names each, one repeats
    assert set(found.proposals.tolist()) == {0, 2} or (expected[1] > expected[0]).any()
    for score, proposal, index in zip(found.scores, found.proposals, found.pred_classes, strict=True):
        torch.testing.assert_close(score, expected[proposal, index])
    assert (found.scores.diff() <= 0).all()
    assert found.has("pred_masks") == masks


def test_names_in_any_order_give_the_same(tower):
    one, other = vocabulary(tower), vocabulary(tower, WORDS[::-1])
    first, second = named(one), named(other)
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    called = [
        [words.names.shown[i] for i in found.pred_classes] for words, found in ((one, first), (other, second))
    ]
    assert called[0] == called[1] and len(set(called[0])) == 4
    other.set_names(one.names)
    assert torch.equal(named(other).pred_classes, first.pred_classes)


def test_names_that_read_alike_are_reported_once(tower):
    words = OpenVocabulary(OpenNames(("dog", "Dog", "cup"), (("dog",), ("Dog",), ("cup",))))
    words.bind(tower)
    found = named(words)
    assert set(found.pred_classes.tolist()) == {0, 2} and len(found) == 4


def test_a_single_name_competes_with_the_background(tower):
    assert (named(vocabulary(tower, ("dog",))).scores < OBJECTNESS.max()).all()
    alone = named(vocabulary(tower, ("dog",), others=()))
    torch.testing.assert_close(alone.scores, OBJECTNESS[[0, 2]])


def test_duplicates_are_dropped_within_a_name(tower):
    overlap = torch.tensor([[1, 0.51, 0.0], [0.51, 1, 0.49], [0.0, 0.49, 1]])
    scores, classes = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([1, 1, 1])
    assert distinct(scores, classes, overlap).tolist() == [1, 2]
    assert distinct(scores, torch.tensor([0, 1, 1]), overlap).tolist() == [1, 2, 0]
    assert distinct(scores[:0], classes[:0], overlap[:0, :0]).tolist() == []
    by_mask, by_box = (overlaps(Proposer(masks).proposals()[0]) for masks in (True, False))
    torch.testing.assert_close(by_mask, by_box)
    assert by_mask[0, 1] == pytest.approx(35 / 36)


def test_an_image_to_look_at_has_one_name_a_proposal(tower):
    found = named(vocabulary(tower))
    best = best_of_each(found)
    assert sorted(best.proposals.tolist()) == sorted(set(found.proposals.tolist()))
    for score, proposal in zip(best.scores, best.proposals, strict=True):
        assert score == found.scores[found.proposals == proposal].max()


@pytest.mark.parametrize("masks", [True, False])
def test_nothing_proposed_is_nothing_found(tower, masks):
    class Empty(Proposer):
        def proposals(self, inputs):
            (found,) = super().proposals()
            return [found[torch.zeros(0, dtype=torch.int64)]]

    words = vocabulary(tower)
    (found,) = words.inference(
        Empty(masks), HeadInputs(torch.randn(1, 192, 8, 8), None, IMAGES, [SIZE], SIZE)
    )
    assert len(found) == 0 and {"scores", "pred_classes"} <= set(found.get_fields())


def test_known_lists_and_files(tmp_path):
    assert len(read_names("NAMES", ("coco",)).shown) == 80
    lvis = read_names("NAMES", ("lvis",))
    assert len(lvis.shown) == 1203 and lvis.synonyms[0] == ("aerosol can", "spray can")
    assert len(read_names("NAMES", ("objects365",)).shown) == 365
    (tmp_path / "names.txt").write_text("red panda\n\n wok \nred  panda\n")
    assert read_names("NAMES", (str(tmp_path / "names.txt"),)).shown == ("red panda", "wok")


def test_what_cannot_be_is_refused(tower, tmp_path):
    with pytest.raises(ConfigError, match="--names has no name"):
        read_names("--names", (" ",))
    with pytest.raises(ConfigError, match="nowhere.txt, which cannot be read"):
        read_names("--names", (str(tmp_path / "nowhere.txt"),))
    with pytest.raises(ConfigError, match="no text encoder"):
        OpenVocabulary(read_names("NAMES", WORDS)).bind(CLIPViT(tower.tower))
    with pytest.raises(ConfigError, match="TEXT_POWER -1"):
        vocabulary(tower, text_power=-1.0)
    cfg = model_zoo.get_config("visft_demo")
    assert build_open_vocabulary(cfg, {"detection": Proposer(False)}) is None
    cfg.MODEL.VISFT.OPEN_VOCABULARY.NAMES = ("dog",)
    with pytest.raises(ConfigError, match=r"of MODEL.VISFT.HEADS \(captioning\) none proposes"):
        build_open_vocabulary(cfg, {"captioning": torch.nn.Identity()})
    cfg.MODEL.VISFT.OPEN_VOCABULARY.NAMES, cfg.DATASETS.TEST = ("test",), ()
    with pytest.raises(ConfigError, match="DATASETS.TEST is empty"):
        build_open_vocabulary(cfg, {"detection": Proposer(False)})
