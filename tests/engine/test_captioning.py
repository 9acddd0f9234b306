"""Captions in a run: the vocabulary is built, kept, carried and found again; bad input is refused; images drawn."""

import json
import shutil
from pathlib import Path

import pytest
import runs
from captioned_shapes import SMALL, captioned
from PIL import Image
from refusals import prepare
from tiny_run import tiny_arguments

from visft.checkpoint import files
from visft.checkpoint.run_folder import describe, newest_checkpoint
from visft.commands import predict, train_net
from visft.data.caption_vocabulary import build_vocabulary
from visft.engine import checks, run_vocabulary, settings, stages
from visft.errors import ConfigError, DataError
from visft.modeling.heads import Vocabulary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    return captioned(folder / "train"), captioned(folder / "test", seed=1)


def arguments(data, output: Path, *options: object) -> list[str]:
    train, test = data
    keys = SMALL | {"VISFT.DATA.TRAIN_CAPTIONS": train[2], "VISFT.DATA.TEST_CAPTIONS": test[2]}
    return [*tiny_arguments(train[:2], test[:2], output), *runs.words(keys), *map(str, options)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of both stages over boxes and captions, and its arguments."""
    output = tmp_path_factory.mktemp("run") / "out"
    words = arguments(data, output)
    assert train_net.main(words) == 0
    return output, words


def test_the_vocabulary_is_kept_and_carried(run, data):
    output, _ = run
    expected = build_vocabulary([str(data[0][2])], 1)
    assert Vocabulary.read(output / "vocabulary.json") == expected
    heads = newest_checkpoint(output / "heads")
    assert Vocabulary.read(heads) == expected
    assert "vocabulary" not in describe(newest_checkpoint(output / "lora"))["settings"]
    rows = files.read_shapes(heads)["heads.captioning.decoder.embedding.weight"][0]
    assert rows == len(expected)


def test_figures_losses_and_images(run):
    output, _ = run
    report = files.read_json(output / "report.json")
    for side in ("before", "after"):
        for name in ("captioning/CIDEr", "captioning/BLEU4", "captioning/ROUGE_L", "detection/bbox/AP50"):
            assert report[side][name] >= 0, name
    metrics = (output / "lora" / "metrics.json").read_text()
    assert '"captioning/loss_words"' in metrics and '"captioning/loss_attention"' in metrics
    images = {path.stem for path in (output / "predictions").glob("*.png")}
    words = {name for name in images if name.endswith("_words")}
    assert words and {name.removesuffix("_words") for name in words} == images - words
    text = (output / "report.md").read_text()
    for title in ("Ground truth beside", "Where the caption head looked"):
        assert title in text
    assert all(f"predictions/{name}.png" in text for name in images)


def test_a_finished_run_is_resumed_and_evaluated_with_its_words(run, data):
    output, words = run
    before = (output / "vocabulary.json").read_bytes()
    assert train_net.main(["--resume", *words]) == 0
    assert (output / "vocabulary.json").read_bytes() == before
    assert train_net.main(["--eval-only", "--resume", *words]) == 0
    figures, report = (files.read_json(output / f"{name}.json") for name in ("evaluation", "report"))
    assert figures["captioning/CIDEr"] == pytest.approx(report["after"]["captioning/CIDEr"])


def test_a_run_elsewhere_is_found_by_its_weights(run, data, tmp_path):
    output, words = run
    elsewhere = [*words, "OUTPUT_DIR", str(tmp_path / "new")]
    assert train_net.main(["--eval-only", *elsewhere, "MODEL.WEIGHTS", str(output)]) == 0
    figures = files.read_json(tmp_path / "new" / "evaluation.json")
    report = files.read_json(output / "report.json")
    assert figures["captioning/CIDEr"] == pytest.approx(report["after"]["captioning/CIDEr"])
    # A heads file on its own carries its words too.
    alone = tmp_path / "heads.safetensors"
    shutil.copy(newest_checkpoint(output / "heads"), alone)
    cfg = settings.load_config(None, words[2:])
    cfg.OUTPUT_DIR, cfg.MODEL.VISFT.HEAD_FILES = str(tmp_path / "none"), (str(alone),)
    assert run_vocabulary.with_vocabulary(cfg).MODEL.VISFT.CAPTIONING.VOCABULARY == str(alone)


def test_predict_draws_words_and_says_the_caption(run, data, tmp_path, caplog):
    output, words = run
    image = sorted(data[1][1].glob("*"))[0]
    out = tmp_path / "out"
    command = runs.option(words, "--input", str(image), "--output", str(out), "--weights", str(output))
    with caplog.at_level("INFO", logger="visft"):
        assert predict.main(command) == 0
    assert {path.name for path in out.iterdir()} == {f"{image.stem}.png", f"{image.stem}_words.png"}
    said = next(record.getMessage() for record in caplog.records if 'captioning "' in record.getMessage())
    count = len(said.partition('captioning "')[2].rstrip('"').split())
    assert 1 <= count <= 6
    columns = Image.open(out / f"{image.stem}_words.png").width // 160
    assert columns == min(count + 1, 6)


def test_another_vocabulary_than_the_runs_is_refused(run, tmp_path):
    output, words = run
    ours = Vocabulary.read(output / "vocabulary.json").words[1:-3]
    Vocabulary(ours[::-1]).write(tmp_path / "other.json")
    other = ["MODEL.VISFT.CAPTIONING.VOCABULARY", str(tmp_path / "other.json")]
    message = "other.json has other words than those that .*safetensors was trained"
    with pytest.raises(ConfigError, match=message):
        prepare(["--eval-only", *words, *other, "MODEL.WEIGHTS", str(output)])
    assert train_net.main(["--resume", *words, *other]) == 1


def test_words_may_be_learned_anew(run, data, tmp_path):
    output, words = run
    more = ("VISFT.DATA.TRAIN_CAPTIONS", str(tmp_path / "captions.json"), "OUTPUT_DIR", str(tmp_path / "new"))
    content = json.loads(data[0][2].read_text())
    content["annotations"][0]["caption"] = "an unheard word"
    (tmp_path / "captions.json").write_text(json.dumps(content))
    start = [*words, *more, "MODEL.VISFT.HEAD_FILES", f"('{output}',)"]
    cfg = run_vocabulary.with_vocabulary(prepare(start))
    kept = Vocabulary.read(output / "vocabulary.json")
    assert Vocabulary.read(cfg.MODEL.VISFT.CAPTIONING.VOCABULARY) == kept
    cfg = prepare([*start, "MODEL.VISFT.CAPTIONING.REINIT_CLASSES", "True"])
    cfg = run_vocabulary.with_vocabulary(cfg, tmp_path)
    assert "unheard" in Vocabulary.read(cfg.MODEL.VISFT.CAPTIONING.VOCABULARY).words
    ours = stages.initial_model(cfg, 0).heads["captioning"].state_dict()
    theirs = files.read_tensors(newest_checkpoint(output / "heads"))
    other = {n for n, t in ours.items() if not t.equal(theirs.get(f"heads.captioning.{n}", t[:0]))}
    assert other == {"decoder.embedding.weight", "decoder.fc.weight", "decoder.fc.bias"}


DATA, HEAD = "VISFT.DATA.TRAIN_CAPTIONS", "MODEL.VISFT.CAPTIONING"
REFUSED = [
    (("VISFT.CAPTION_METRICS", "('CIDEr', 'METEROR')"), ConfigError, "METEROR.*METEOR"),
    ((DATA, ""), DataError, "`captioning` learns captions, and no image.*visft_own_train"),
    ((DATA, "/nowhere/c.json"), DataError, "/nowhere/c.json.*VISFT.DATA.TRAIN_CAPTIONS"),
    ((f"{HEAD}.VOCABULARY", "/nowhere/v.json"), DataError, "VOCABULARY: .*/nowhere/v.json"),
    ((f"{HEAD}.MIN_WORD_COUNT", 0), ConfigError, "MIN_WORD_COUNT is 0"),
    ((f"{HEAD}.MIN_WORD_COUNT", 999), DataError, "no word occurs 999 times"),
    ((f"{HEAD}.HEAD", "CaptionHaed"), ConfigError, "CaptionHaed.*`CaptionHead`"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_before_anything_is_built(data, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        prepare(arguments(data, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_without_a_vocabulary_nothing_is_evaluated(data, tmp_path):
    with pytest.raises(ConfigError, match="VOCABULARY is empty, and there is no vocabulary.json"):
        prepare(["--eval-only", *arguments(data, tmp_path / "out")])


def test_heads_without_captions_need_no_vocabulary(data, tmp_path):
    cfg = prepare(arguments(data, tmp_path / "out", "MODEL.VISFT.HEADS", "('detection',)", DATA, ""))
    assert run_vocabulary.with_vocabulary(cfg, tmp_path / "out") is cfg
    assert run_vocabulary.words_of(cfg) == []
    checks.check(cfg, train=True)
