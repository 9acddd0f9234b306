"""Caption metrics: COCO's own words and figures (Java's, kept in a file), and the evaluator."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict

from towerbench.caption_tokens import ptb_words
from visft import model_zoo
from visft.errors import ConfigError
from visft.evaluation import CaptionEvaluator, HeadsEvaluator, build_evaluator, caption_metrics
from visft.evaluation.caption_metrics import METRICS, caption_scores, check_metrics
from visft.modeling.heads import Caption

SAMPLE = json.loads(Path(__file__).with_name("caption_sample.json").read_text())
IMAGES = SAMPLE["images"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: str(image["image_id"]))
def test_words_are_those_of_the_java_tokenizer(image):
    assert [ptb_words(text) for text in (image["caption"], *image["references"])] == image["words"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("...", ""),
        ("'Tis \u201cthe\u201d caf\u00e9\u2019s  cat\n", "'tis the caf\u00e9 's cat"),
        ("couldn't've", "could n't 've"),
        ("A man in a suit.A woman", "a man in a suit.a woman"),
    ],
)
def test_odd_words(text, words):
    assert ptb_words(text) == words


def test_figures_are_those_of_pycocoevalcap():
    references = {image["image_id"]: image["references"] for image in IMAGES}
    found = caption_scores(references, {image["image_id"]: image["caption"] for image in IMAGES})
    assert found == pytest.approx({name: 100 * value for name, value in SAMPLE["scores"].items()}, abs=1e-6)
    assert list(found) == ["BLEU1", "BLEU2", "BLEU3", "BLEU4", "ROUGE_L", "CIDEr"]


def test_which_metrics_there_are(monkeypatch):
    references = {image["image_id"]: image["references"] for image in IMAGES}
    said = {image["image_id"]: image["caption"] for image in IMAGES}
    assert list(caption_scores(references, said, ("CIDEr",))) == ["CIDEr"]
    with pytest.raises(ConfigError, match="`SPICY`; expected some of BLEU, ROUGE_L, CIDEr, METEOR, SPICE"):
        check_metrics(("CIDEr", "SPICY"))
    monkeypatch.setenv("PATH", "")
    check_metrics(METRICS)
    for name in ("METEOR", "SPICE"):
        with pytest.raises(ConfigError, match=f"{name}.*no `java`"):
            check_metrics((name,))


def test_spice_is_asked_for_its_parser_before_anything_is_run(tmp_path, monkeypatch):
    """pycocoevalcap would download it by HTTP, at the first evaluation, after the training."""
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(caption_metrics, "find_spec", lambda name: package)
    with pytest.raises(ConfigError, match="SPICE, and .*spice/lib/stanford-corenlp-3.6.0.jar is not there"):
        check_metrics(("SPICE",))
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in caption_metrics.CORENLP:
        (tmp_path / "spice" / "lib" / name).touch()
    check_metrics(("SPICE",))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor_where_there_is_java():
    references = {image["image_id"]: image["references"] for image in IMAGES}
    said = {image["image_id"]: image["caption"] for image in IMAGES}
    assert caption_scores(references, said, ("METEOR",))["METEOR"] == pytest.approx(
        SAMPLE["METEOR"], abs=0.01
    )


def test_a_reference_itself_scores_best():
    references = {image["image_id"]: image["references"][:1] for image in IMAGES}
    best = caption_scores(references, {key: texts[0] for key, texts in references.items()})
    assert best["CIDEr"] > 400 and best["BLEU4"] == pytest.approx(100, abs=0.1)
    assert best["ROUGE_L"] == pytest.approx(100)


NAME = "caption_evaluation_test"


@pytest.fixture
def data_set():
    """The sample as a data set by code, its last image without captions."""
    records = [
        {
            "file_name": f"{image['image_id']}.jpg",
            "image_id": image["image_id"],
            "captions": image["references"],
        }
        for image in IMAGES
    ]
    records[-1]["captions"] = ["..."]
    DatasetCatalog.register(NAME, lambda: records)
    yield records
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def evaluate(evaluator) -> dict[str, float]:
    evaluator.reset()
    for image in IMAGES:
        evaluator.process([{"image_id": image["image_id"]}], [{"captioning": Caption(image["caption"])}])
    return flatten_results_dict(evaluator.evaluate())


def test_the_evaluator_scores_images_with_captions(data_set):
    found = evaluate(CaptionEvaluator(NAME, ["captioning"]))
    scored = IMAGES[:-1]
    expected = caption_scores(
        {image["image_id"]: image["references"] for image in scored},
        {image["image_id"]: image["caption"] for image in scored},
    )
    assert found == pytest.approx({f"captioning/{name}": value for name, value in expected.items()})


def test_nothing_to_compare_gives_no_figures(data_set):
    for record in data_set:
        record["captions"] = []
    assert evaluate(CaptionEvaluator(NAME, ["captioning"])) == {}


def test_which_evaluators_a_config_gets(data_set):
    cfg = model_zoo.get_config("visft_demo")
    cfg.MODEL.VISFT.HEADS = ("captioning",)
    assert isinstance(build_evaluator(cfg, NAME), CaptionEvaluator)
    MetadataCatalog.get(NAME).thing_classes = ["thing"]
    for record in data_set:
        record |= {"height": 10, "width": 10, "annotations": []}
    cfg.MODEL.VISFT.HEADS = ("detection", "captioning", "segmentation")
    both = build_evaluator(cfg, NAME)._evaluators
    assert [type(evaluator) for evaluator in both] == [HeadsEvaluator, CaptionEvaluator]
    assert both[0].heads == ("detection", "segmentation") and both[1].heads == ("captioning",)
    assert torch.is_tensor(Caption("x").maps)
