"""Captioning of the real suite, on tiny files in the format of nocaps and of COCO's captions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from towerbench import Context, FeatureStore, Tower, caption_readout, captions, registered
from towerbench import __main__ as evaluate
from towerbench.errors import DataError
from towerbench.real import captioning

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
PLACES = {"left": 4, "right": 38}
DOMAINS = {"in-domain": 6, "near-domain": 9, "out-domain": 7}
TRAIN = 72


def save(file: Path, number: int, seed: int) -> None:
    rng = np.random.default_rng([number, seed])
    pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
    x, y = PLACES[place(number)] + rng.integers(-2, 3), rng.integers(4, 40)
    pixels[y : y + 20, x : x + 20] = COLOURS[colour(number)]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, quality=95)


def colour(number: int) -> str:
    return list(COLOURS)[number % 4]


def place(number: int) -> str:
    return list(PLACES)[number // 4 % 2]


def texts(number: int) -> list[str]:
    return [
        f"A {colour(number)} square on the {place(number)}.",
        f"there is a {colour(number)} square on the {place(number)}",
        f"a square, {colour(number)}, on the {place(number)}",
    ]


def write(file: Path, images: list[dict], captions_of: dict[int, list[str]]) -> None:
    annotations = [
        {"image_id": key, "id": 10 * key + i, "caption": text}
        for key, several in captions_of.items()
        for i, text in enumerate(several)
    ]
    content = {"licenses": [], "info": {}, "images": images, "annotations": annotations}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    images, told = [], {}
    for i in range(TRAIN):
        save(root / "coco" / "train2017" / f"{9 + i:012d}.jpg", i, 0)
        images.append({"id": 9 + i, "file_name": f"{9 + i:012d}.jpg", "height": 64, "width": 64})
        told[9 + i] = texts(i)
    write(root / "coco" / "annotations" / "captions_train2017.json", images, told)
    images, told = [], {}
    order = [domain for domain, count in DOMAINS.items() for _ in range(count)]
    for i, j in enumerate(np.random.default_rng(0).permutation(len(order)).tolist()):
        name = f"{i:016x}"
        save(root / "nocaps" / "images" / f"{name}.jpg", i, 1)
        images.append(
            {
                "id": i,
                "open_images_id": name,
                "file_name": f"{name}.jpg",
                "coco_url": "",
                "domain": order[j],
                "height": 64,
                "width": 64,
                "license": 0,
                "date_captured": "2018-11-06 11:04:33",
            }
        )
        told[i] = texts(i) * 3
    write(root / "nocaps" / "nocaps_val_4500_captions.json", images, told)
    return root


@pytest.fixture(autouse=True)
def short(monkeypatch):
    recipe = replace(captioning.RECIPE, dim=64, epochs=16, batch=8, rate=3e-3, min_count=2)
    monkeypatch.setattr(captioning, "RECIPE", recipe)


@pytest.fixture
def store():
    made = FeatureStore(Tower.load(demo_tower.NAME, "demo", device="cpu"))
    yield made
    made.close()


def of(name: str, data: Path):
    return registered()[f"captioning nocaps-{name}"](Context(data=data))


def test_the_readout_says_what_is_shown_and_is_scored_by_cider(store, data):
    from pycocoevalcap.cider.cider import Cider

    benchmark = of("near", data)
    images = benchmark.images(0)
    told = benchmark.told(store, images, 0)
    scores = benchmark.items(store, images, 0)
    assert len(told) == DOMAINS["near-domain"] and np.mean(scores) > 1

    def plain(text):
        return text.lower().replace(",", "").rstrip(".")

    truth = {i: [plain(text) for text in several] for i, several in enumerate(benchmark.set.captions)}
    _, expected = Cider().compute_score(truth, {i: [plain(text)] for i, text in enumerate(told)})
    np.testing.assert_allclose(scores, expected)
    named = [
        all(word in text.split() for word in (first.split()[1], first.rstrip(".").split()[-1]))
        for text, (first, *_) in zip(told, benchmark.set.captions, strict=True)
    ]
    assert np.mean(named) > 0.7, list(zip(told, benchmark.set.captions, strict=True))


def test_domains_are_apart_and_only_the_in_domain_is_marked(data):
    sets = {name: of(name, data) for name in ("in", "near", "out")}
    assert {name: len(each.set.files) for name, each in sets.items()} == {"in": 6, "near": 9, "out": 7}
    assert len({file for each in sets.values() for file in each.set.files}) == sum(DOMAINS.values())
    assert [each.in_domain for each in sets.values()] == [True, False, False]
    for each in sets.values():
        for file, several in zip(each.set.files, each.set.captions, strict=True):
            assert several == tuple(texts(int(file.stem, 16)) * 3)


def test_the_readout_is_trained_once_and_does_not_depend_on_who_asks_first(store, data, monkeypatch):
    trained, count = caption_readout.trained, []
    monkeypatch.setattr(captioning, "RECIPE", replace(captioning.RECIPE, epochs=2))
    monkeypatch.setattr(caption_readout, "trained", lambda *arguments: count.append(1) or trained(*arguments))
    forth = {name: of(name, data) for name in ("in", "near", "out")}
    first = {name: each.items(store, each.images(0), 0) for name, each in forth.items()}
    assert len(count) == 1
    other = FeatureStore(store.tower)
    torch.manual_seed(99)
    for name in ("out", "in"):
        each = of(name, data)
        assert (each.items(other, each.images(0), 0) == first[name]).all()
    assert len(count) == 2
    forth["in"].items(store, forth["in"].images(1), 1)  # another seed is another readout
    assert len(count) == 3
    other.close()


def test_the_readout_sees_a_bounded_part_that_is_the_same_for_all(data, monkeypatch):
    benchmark = of("in", data)
    assert len(benchmark.readout["train"].files) == 64 and len(benchmark.readout["held"].files) == 8
    monkeypatch.setattr(captioning, "IMAGES", 20)
    captioning._readout_sets.cache_clear()
    small = of("in", data).readout
    captioning._readout_sets.cache_clear()
    train, held = (set(small[part].files) for part in ("train", "held"))
    assert len(train) == 17 and len(held) == 3 and not train & held
    places = sorted(int(file.stem) - 9 for file in train | held)
    assert places[0] < 10 and places[-1] > 60  # spread over the file, not its beginning
    sets = of("out", data).images(0)
    assert {images.fit for images in sets.values()} == {"squash"}


def test_features_are_standardised_by_those_that_are_trained_on(store, data, monkeypatch):
    benchmark = of("in", data)
    images = benchmark.images(0)
    told = {part: each.captions for part, each in benchmark.readout.items()}
    readout = captioning.trained(store, images, told, 0)
    maps = store.dense(images["train"])
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps, 8).flatten(2).transpose(1, 2)
    deviation = pooled.flatten(0, 1).std(0, correction=0)
    seen = []
    monkeypatch.setattr(caption_readout.Captioner, "said", lambda self, cells: seen.append(cells) or [])
    readout(images["train"])
    torch.testing.assert_close(
        torch.cat(seen), (pooled - pooled.mean((0, 1))) / deviation, rtol=1e-2, atol=1e-3
    )


def test_what_is_missing_says_what_to_put_where(data, tmp_path, monkeypatch):
    cls = registered()["captioning nocaps-out"]
    assert cls.missing(Context(data=data)) is None
    wanted = cls.missing(Context(data=tmp_path))
    for words in ("nocaps/nocaps_val_4500_captions.json", "nocaps/images or nocaps/val", "coco/train2017"):
        assert words in wanted
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    assert "pycocoevalcap" in cls.missing(Context(data=data))


def test_broken_data_are_refused(data, tmp_path):
    (tmp_path / "nocaps" / "val").mkdir(parents=True)
    file = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    image = {"id": 0, "file_name": "0.jpg", "domain": "near-domain"}
    write(file, [image], {0: ["a dog"]})
    with pytest.raises(DataError, match="no image of `nocaps out-domain` has a caption"):
        _ = of("out", tmp_path).set
    with pytest.raises(DataError, match="0.jpg: there is no such file"):
        of("near", tmp_path).set.images()
    del image["domain"]
    write(file, [image], {0: ["a dog"]})
    with pytest.raises(DataError, match="no usable `domain`.*right file"):
        _ = of("near", tmp_path).set
    file.write_text(json.dumps({"images": [image]}))  # as nocaps_val_image_info.json is
    with pytest.raises(DataError, match="no usable `annotations`"):
        _ = of("near", tmp_path).set
    coco = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    write(coco, [{"id": 1, "file_name": "1.jpg"}], {1: ["a dog"]})
    with pytest.raises(DataError, match="captions of 1 image"):
        _ = of("near", tmp_path).readout


def test_the_whole_suite(data, tmp_path, monkeypatch):
    monkeypatch.setattr(captioning, "RECIPE", replace(captioning.RECIPE, epochs=3))
    arguments = ["--model", demo_tower.NAME, "--pretrained", "demo", "--data", str(data), "--seeds", "2"]
    arguments += ["--compare", str(demo_tower.WEIGHTS_FILE)]
    suite = "captioning nocaps-in,captioning nocaps-near,captioning nocaps-out"
    assert evaluate.main([*arguments, "--suite", suite, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"].removeprefix("captioning nocaps-"): row for row in results["benchmarks"]}
    assert {name: (row["n"], row["in_domain"]) for name, row in rows.items()} == {
        "in": (6, True),
        "near": (9, False),
        "out": (7, False),
    }
    (family,) = results["families"]
    assert family["name"] == "captioning" and not family["in_domain"] and family["n"] == 16
    assert family["base"] == pytest.approx((rows["near"]["base"] + rows["out"]["base"]) / 2, abs=1e-3)
    assert family["difference"] == family["low"] == family["high"] == 0
