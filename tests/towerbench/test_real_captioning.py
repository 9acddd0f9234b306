"""Captioning of the real suite, on tiny files in the format of nocaps and of COCO's captions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from towerbench import FeatureStore, caption_readout
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
def store(store):
    """Without readouts of other tests."""
    made = FeatureStore(store.tower)
    yield made
    made.close()


@pytest.fixture
def nocaps(of):
    return lambda name, **more: of(f"captioning nocaps-{name}", **more)


def test_the_readout_says_what_is_shown_and_is_scored_by_cider(store, nocaps):
    from pycocoevalcap.cider.cider import Cider

    benchmark = nocaps("near")
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


def test_domains_are_apart_and_only_the_in_domain_is_marked(nocaps):
    sets = [nocaps(name) for name in ("in", "near", "out")]
    assert [len(each.set.files) for each in sets] == list(DOMAINS.values())
    assert len({file for each in sets for file in each.set.files}) == sum(DOMAINS.values())
    assert [each.in_domain for each in sets] == [True, False, False]
    for each in sets:
        for file, several in zip(each.set.files, each.set.captions, strict=True):
            assert several == tuple(texts(int(file.stem, 16)) * 3)


def test_the_readout_is_trained_once_and_does_not_depend_on_who_asks_first(run, store, monkeypatch):
    trained, count = caption_readout.trained, []
    monkeypatch.setattr(captioning, "RECIPE", replace(captioning.RECIPE, epochs=2))
    monkeypatch.setattr(caption_readout, "trained", lambda *arguments: count.append(1) or trained(*arguments))
    first = {name: run(f"captioning nocaps-{name}")[1] for name in ("in", "near", "out")}
    assert len(count) == 1
    other = FeatureStore(store.tower)
    torch.manual_seed(99)
    for name in ("out", "in"):
        assert (run(f"captioning nocaps-{name}", store=other)[1] == first[name]).all()
    assert len(count) == 2
    run("captioning nocaps-in", seed=1)  # another seed is another readout
    assert len(count) == 3
    other.close()


def test_the_readout_sees_a_bounded_part_that_is_the_same_for_all(nocaps, monkeypatch):
    benchmark = nocaps("in")
    assert len(benchmark.readout["train"].files) == 64 and len(benchmark.readout["held"].files) == 8
    monkeypatch.setattr(captioning, "IMAGES", 20)
    captioning._readout_sets.cache_clear()
    small = nocaps("in").readout
    captioning._readout_sets.cache_clear()
    train, held = (set(small[part].files) for part in ("train", "held"))
    assert len(train) == 17 and len(held) == 3 and not train & held
    places = sorted(int(file.stem) - 9 for file in train | held)
    assert places[0] < 10 and places[-1] > 60  # spread over the file, not its beginning
    sets = nocaps("out").images(0)
    assert {images.fit for images in sets.values()} == {"squash"}


def test_features_are_standardised_by_those_that_are_trained_on(store, nocaps, monkeypatch):
    benchmark = nocaps("in")
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


@pytest.mark.parametrize(
    ("domain", "captions_of", "left_out", "message"),
    [
        ("out", {0: ["a dog"]}, "", "no image of `nocaps out-domain` has a caption"),
        ("near", {0: ["a dog"]}, "", "0.jpg: there is no such file"),
        ("near", {0: ["a dog"]}, "domain", "no usable `domain`.*right file"),
        ("near", {}, "annotations", "no usable `annotations`"),  # as nocaps_val_image_info.json is
    ],
)
def test_broken_data_are_refused(tmp_path, nocaps, domain, captions_of, left_out, message):
    (tmp_path / "nocaps" / "val").mkdir(parents=True)
    file = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    write(file, [{"id": 0, "file_name": "0.jpg", "domain": "near-domain"}], captions_of)
    file.write_text(file.read_text().replace(f'"{left_out}"', '"other"'))
    with pytest.raises(DataError, match=message):
        nocaps(domain, where=tmp_path).set.images()
    write(tmp_path / captioning.COCO_CAPTIONS, [{"id": 1, "file_name": "1.jpg"}], {1: ["a dog"]})
    with pytest.raises(DataError, match="captions of 1 image"):
        _ = nocaps(domain, where=tmp_path).readout


def test_the_whole_suite(data, command, monkeypatch):
    monkeypatch.setattr(captioning, "RECIPE", replace(captioning.RECIPE, epochs=3))
    results, rows = command(data, "captioning nocaps-in,captioning nocaps-near,captioning nocaps-out")
    found = {name.removeprefix("captioning nocaps-"): (r["n"], r["in_domain"]) for name, r in rows.items()}
    assert found == {"in": (6, True), "near": (9, False), "out": (7, False)}
    (family,) = results["families"]
    assert family["name"] == "captioning" and not family["in_domain"] and family["n"] == 16
    counted = [rows[f"captioning nocaps-{name}"]["base"] for name in ("near", "out")]
    assert family["base"] == pytest.approx(np.mean(counted), abs=1e-3)
