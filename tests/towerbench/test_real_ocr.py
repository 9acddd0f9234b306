"""Word images, on tiny LMDBs and folders of the true formats."""

import io
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image, ImageDraw

from towerbench import ctc_readout
from towerbench.errors import DataError
from towerbench.real import ocr, words

LABELS = ("Able", "it's", "CAFÉ 24", "!!", "a" * 26, "Zeal")
"""As they are written: one has no letter, one more than are read."""

READ = ["able", "its", "cafe24", "zeal"]


def drawn(text: str, seed: int = 0) -> np.ndarray:
    """A word on a ground of its own."""
    rng = np.random.default_rng([seed, len(text)])
    image = Image.new("RGB", (12 * len(text) + 8, 24), tuple(int(v) for v in rng.integers(150, 255, 3)))
    ImageDraw.Draw(image).text((4, 4), text, fill=(20, 20, 20))
    return np.asarray(image)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def database(folder: Path, labels=LABELS, count=None, without=(), broken=()) -> Path:
    """As deep-text-recognition-benchmark's create_lmdb_dataset.py writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as to:
        for number, text in enumerate(labels, 1):
            entries = {f"image-{number:09d}": png(drawn(text)), f"label-{number:09d}": text.encode()}
            for key, value in entries.items():
                if key not in without:
                    to.put(key.encode(), b"\xff\xfe" if key in broken else value)
        to.put(b"num-samples", str(len(labels) if count is None else count).encode())
    (folder / "lock.mdb").unlink(missing_ok=True)
    return folder


def listed(folder: Path, name: str, separator: str, labels=LABELS, below: str = "image") -> Path:
    """Images with a list of labels."""
    rows = []
    for number, text in enumerate(labels):
        file = folder / below / f"word_{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(drawn(text)))
        rows.append(f"{below}/{file.name}{separator}{text}")
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Few words, and typefaces' words at that."""
    monkeypatch.setattr(ocr, "COUNTS", {"train": 24, "held": 8})
    monkeypatch.setattr(ocr, "EPOCHS", 2)
    ocr.readout_sets.cache_clear()
    yield
    ocr.readout_sets.cache_clear()


@pytest.mark.parametrize(
    "make",
    [
        database,
        lambda folder: listed(folder, "test_label.txt", " "),
        lambda folder: listed(folder, "rec_gt_test.txt", "\t"),
        lambda folder: listed(folder, "gt.txt", "\t", below="test"),
    ],
    ids=["lmdb", "mmocr", "paddleocr", "gt"],
)
def test_every_format_says_the_same(tmp_path, make, caplog):
    found = words.word_set("set", make(tmp_path / "set"))
    assert found.labels == READ and "2 of 6 words are left out" in caplog.text
    shown = list(found.read())
    for pixels, text in zip(shown, ("Able", "it's", "CAFÉ 24", "Zeal"), strict=True):
        assert np.array_equal(pixels, drawn(text))


def test_names_may_be_below_the_folder_above(tmp_path):
    """As PaddleOCR's lists have it: `train_data/rec/test/word_1.png` of data in train_data/rec."""
    folder = listed(tmp_path / "rec", "rec_gt_test.txt", "\t")
    text = (folder / "rec_gt_test.txt").read_text(encoding="utf-8").replace("image/", "rec/image/")
    (folder / "rec_gt_test.txt").write_text(text, encoding="utf-8")
    assert words.word_set("set", folder).labels == READ


def test_words_lie_in_lines(tmp_path):
    found = words.word_set("set", database(tmp_path / "set", [*"abcde"]))
    made = found.images()
    shown = list(made.make())
    assert made.count == len(shown) == 2 and made.dense and shown[0].shape == (448, 448, 3)
    tall, wide = np.zeros((40, 10, 3), np.uint8), np.zeros((10, 80, 3), np.uint8)
    tall[:20], wide[:, :40] = 200, 200
    line = words.line(tall)  # 112 x 28 in the middle, on 100
    assert line.shape == (112, 448, 3) and (line[:, 200] == 100).all() and (line[:, 240] == 100).all()
    assert (line[4, 212:236] == 200).all() and (line[-4, 212:236] == 0).all()
    line = words.line(wide)  # 56 x 448
    assert (line[:28] == 100).all() and (line[-28:] == 100).all() and (line[40:70, :200] == 200).all()
    # Another label or file is another set.
    other = words.word_set("set", database(tmp_path / "other", [*"abcdf"]))
    assert made.key != other.images().key
    assert made.key == words.word_set("set", tmp_path / "set").images().key


def test_accuracy_is_that_of_words_whatever_image_they_share():
    scores = ctc_readout.accuracies(["ab", "xb", "", "q", "cat"], ["ab", "ab", "cd", "q", "cat"])
    sums = ocr.tallied(scores)
    assert sums.tolist() == [[2, 2.5, 4], [1, 1, 1]]
    # Three of five words are right, and 3.5 of five in letters.
    assert ocr.Ocr.figure(None, sums.mean(0)) == pytest.approx((3 / 5 + 3.5 / 5) / 2)


def test_training_words_are_spread_over_the_lmdbs(tmp_path, small):
    root = tmp_path / "ocr/train/real"
    database(root / "ArT/train", [f"art{i}" for i in range(40)])
    database(root / "Uber/train", [f"uber{i}" for i in range(6)])
    folders = ocr.databases(root)
    assert ocr.training(tmp_path) == root
    assert ocr.shares(folders, 32) == {folders[0]: 26, folders[1]: 6}
    assert ocr.shares(folders, 8) == {folders[0]: 4, folders[1]: 4}
    sets = ocr.readout_sets(root, tuple(ocr.COUNTS.items()))
    train, held = sets["train"].labels, sets["held"].labels
    assert len(train) == 24 and len(held) == 8 and not set(train) & set(held)
    assert sum(text.startswith("uber") for text in (*train, *held)) == 6
    for each in sets.values():
        shown = list(each.read())
        assert all(np.array_equal(p, drawn(t)) for p, t in zip(shown, each.labels, strict=True))


def test_rendered_words_are_the_same_every_time(small):
    train, again, held = (ocr.rendered_words(part, 12) for part in ("train", "train", "held"))
    first, second = list(train.read()), list(again.read())
    assert train.labels == again.labels and all(map(np.array_equal, first, second))
    assert not set(train.labels[::2]) & set(held.labels[::2])
    assert all(words.letters(text) == text for text in (*train.labels, *held.labels))
    assert all(p.dtype == np.uint8 and p.shape[0] < 64 and p.std() > 5 for p in first)
    assert any(any(map(str.isdigit, text)) for text in train.labels)


def test_the_readout_reads_the_words_it_was_trained_on(tmp_path, store, of, monkeypatch):
    """And not those of other images."""
    database(tmp_path / "ocr/train/synth/MJ", ["STOP", "exit", "bank", "Taxi"] * 50)
    database(tmp_path / "ocr/test/SVT", ["STOP", "bank", "exit", "Taxi", "exit", "STOP"])
    monkeypatch.setattr(ocr, "COUNTS", {"train": 180, "held": 20})
    monkeypatch.setattr(ocr, "EPOCHS", 60)
    monkeypatch.setattr(ctc_readout, "WEIGHT_DECAYS", (0.01,))
    ocr.readout_sets.cache_clear()
    benchmark = of("ocr svt", tmp_path)
    assert benchmark.metric.endswith("readout trained on words of ocr/train/synth")
    images = benchmark.images(0)
    scores = benchmark.items(store, images, 0)
    assert scores.shape == (2, 3) and scores[:, 2].tolist() == [4, 2]
    assert benchmark.figure(scores.mean(0)) > 0.75, scores
    benchmark.set.labels[:] = benchmark.set.labels[1:] + benchmark.set.labels[:1]
    other = benchmark.items(store, images, 0)
    assert benchmark.figure(other.mean(0)) < benchmark.figure(scores.mean(0)) - 0.3
    ocr.readout_sets.cache_clear()


def test_the_whole_suite(tmp_path, small, command):
    data = tmp_path / "data"
    database(data / "ocr/test/IIIT5k", ["one", "Two", "3"])
    database(data / "data_lmdb_release/evaluation/IC13_857", ["four", "five"])
    listed(data / "mixture/ct80", "test_label.txt", " ", ["six"])
    results, rows = command(data, "real/ocr", seeds=1)
    assert list(rows) == ["ocr cute80", "ocr ic13", "ocr iiit5k"]
    assert set(results["left_out"]) == {"ocr svt", "ocr ic15", "ocr svtp"}
    assert not any(row["in_domain"] for row in rows.values())
    assert results["families"][0]["metric"].endswith("readout trained on rendered words")
    assert "ocr/test/SVT or data_lmdb_release" in results["left_out"]["ocr svt"]


DATABASES = {
    "has no `label-000000003`, and `num-samples` says 6": {"without": ["label-000000003"]},
    "has no `image-000000002`": {"without": ["image-000000002"]},
    "has no `label-000000007`": {"count": 7},
    "says 5, and there are more": {"count": 5},
    "`num-samples` is b'many'": {"count": "many"},
    "is no UTF-8": {"broken": ["label-000000001"]},
    "none of its 2 labels": {"labels": ["--", "?"]},
    "image-000000001: is no readable image": {"broken": ["image-000000001"]},
}


@pytest.mark.parametrize("message", DATABASES)
def test_databases_that_contradict_themselves_are_refused(tmp_path, message):
    with pytest.raises(DataError, match=message):
        list(words.word_set("set", database(tmp_path, **DATABASES[message])).read())


def test_broken_databases_are_refused(tmp_path):
    folder = database(tmp_path / "set", labels=[f"word{i}" for i in range(200)])
    data = (folder / "data.mdb").read_bytes()
    cut = "data.mdb: is truncated"
    for content, message in (
        *((data[: int(share * len(data))], cut) for share in (0.9, 0.5, 0.1)),
        (data[:100], "is no readable LMDB"),
        (b"no database" * 1000, "is no readable LMDB"),
    ):
        (folder / "data.mdb").write_bytes(content)
        with pytest.raises(DataError, match=message):
            words.word_set("set", folder)
    database(tmp_path / "ocr/train/ST", labels=["only"])
    with pytest.raises(DataError, match="have 1 words"):
        ocr.readout_sets(tmp_path / "ocr/train", (("train", 2), ("held", 1)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image/word_0.png\tone\nimage/gone.png\ttwo\n", "labels.txt: line 2 names image/gone.png"),
        (b"image/word_0.png\tone\nimage/word_1.png\n", "line 2 is `image/word_1.png`"),
        (b"\n", "has no line"),
        (b"\xff\xfe\xfd", "is no readable text"),
        (None, "neither data.mdb nor a list of labels"),
    ],
)
def test_broken_folders_are_refused(tmp_path, content, message):
    file = listed(tmp_path, "labels.txt", "\t") / "labels.txt"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        words.word_set("set", tmp_path)
