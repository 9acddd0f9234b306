"""Retrieval of the real suite: sets that lie on disk as true ones do, and recall computed by loops over open_clip."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from towerbench import Context, recall, registered, statistics
from towerbench import __main__ as evaluate
from towerbench.errors import DataError
from towerbench.real import captioned

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (230, 230, 230)}
SHAPES = ("square", "bar", "column", "frame")
COUNT = 14


def save(file: Path, number: int) -> None:
    """A shape on noise; resized by halves at most, so that every library gives the same pixels."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 90, (64, 96, 3), dtype=np.uint8)
    y, x = rng.integers(2, 20), rng.integers(18, 34)
    height, width = ((30, 30), (10, 40), (40, 10), (30, 30))[number // 4 % 4]
    pixels[y : y + height, x : x + width] = list(COLOURS.values())[number % 4]
    if number // 4 % 4 == 3:
        pixels[y + 5 : y + 25, x + 5 : x + 25] = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, quality=95)


def texts(number: int, how_many: int = 5) -> list[str]:
    """Captions that depend on what is shown; some images share some, word by word."""
    colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
    made = (
        f"A {colour} {shape}.",
        f"the {shape} is {colour}",
        f"{colour} {shape} number {number}",
        f"a {shape} on a dark ground",
        f"a picture of {colour}",
        f"a photo of a {colour} {shape} and noise {number}",
    )
    return list(made[:how_many])


def counts(number: int) -> int:
    """COCO's images have 5 to 7 captions; here 3 to 6."""
    return 3 + number % 4


def karpathy_entry(number: int, filename: str, split: str, how_many: int, **more) -> dict:
    sentences = [
        {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 10 * number + i}
        for i, text in enumerate(texts(number, how_many))
    ]
    ids = [sentence["sentid"] for sentence in sentences]
    return {
        "sentids": ids,
        "imgid": number,
        "sentences": sentences,
        "split": split,
        "filename": filename,
        **more,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    flickr, coco, dci, urban = (
        root / name for name in ("flickr30k", "coco", "densely_captioned_images", "Urban1k")
    )
    images = []
    for i in range(COUNT):
        save(flickr / "flickr30k-images" / f"{100 + i}.jpg", i)
        images.append(karpathy_entry(i, f"{100 + i}.jpg", "test", counts(i)))
    images.insert(3, karpathy_entry(50, "not_there.jpg", "train", 5))
    images.append(karpathy_entry(51, "not_there_either.jpg", "val", 5))
    (flickr / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))

    images = []
    for i, split in enumerate(("test", "restval", "test", "train")):
        folder, number = "train2014" if split == "train" else "val2014", 391895 + i
        entry = karpathy_entry(
            i, f"COCO_{folder}_{number:012d}.jpg", split, 5, filepath=folder, cocoid=number
        )
        images.append(entry)
    (coco / "annotations").mkdir(parents=True)
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    save(coco / "train2017" / "000000391895.jpg", 0)
    save(coco / "val2017" / "000000391897.jpg", 2)
    listed, annotations = [], []
    for i in range(COUNT):
        number = 1000 + i
        save(coco / "val2017" / f"{number:012d}.jpg", i)
        listed.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 64, "width": 96})
        for text in texts(i, counts(i)):
            annotations.append({"image_id": number, "id": len(annotations), "caption": text})
    annotations.reverse()
    file = coco / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps({"info": {}, "licenses": [], "images": listed, "annotations": annotations}))

    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    (dci / "annotations").mkdir(parents=True)
    for i in range(COUNT):
        save(dci / "photos" / f"sa_{1543967 + i}.jpg", i)
        entry = {
            "image": f"sa_{1543967 + i}.jpg",
            "short_caption": texts(i)[0],
            "extra_caption": " Much more is to be said of it." * (i % 3 * 20) + f" It is number {i}. ",
            "mask_data": {},
            "mask_keys": [],
        }
        name = f"{112956 + i}-data.json"
        (dci / "annotations" / name).write_text(json.dumps(entry))
        splits[("train", "valid", "test")[i % 3]].append(name)
    (dci / "splits.json").write_text(json.dumps(splits))

    (urban / "caption").mkdir(parents=True)
    for i in range(COUNT):
        save(urban / "image" / f"{i + 1:05d}.jpg", i)
        (urban / "caption" / f"{i + 1:05d}.txt").write_text(f"{texts(i)[1]} {texts(i, 6)[-1]}\nnot this line")
    return root


@pytest.fixture(scope="module")
def clip():
    import open_clip

    demo_tower.register(open_clip)
    model, _, preprocess = open_clip.create_model_and_transforms(
        demo_tower.NAME, pretrained=str(demo_tower.WEIGHTS_FILE)
    )
    return model.eval(), preprocess, open_clip.get_tokenizer(demo_tower.NAME)


@torch.no_grad()
def recalls_by_loops(clip, found: captioned.CaptionedSet) -> list[float]:
    """In per cent: of captions at 1, 5, 10, then of images, with open_clip's own preprocessing."""
    model, preprocess, tokenizer = clip
    images = [
        model.encode_image(preprocess(Image.open(file).convert("RGB"))[None])[0] for file in found.files
    ]
    images = [(image / image.norm()).double().numpy() for image in images]
    pairs = [(i, text) for i, several in enumerate(found.captions) for text in several]
    lines = [model.encode_text(tokenizer([text]))[0] for _, text in pairs]
    lines = [(line / line.norm()).double().numpy() for line in lines]
    of_captions, of_images = [], []
    for (owner, _), line in zip(pairs, lines, strict=True):
        order = sorted(range(len(images)), key=lambda i: -(images[i] @ line))
        of_captions.append(order.index(owner))
    for i, image in enumerate(images):
        # Of equal texts an image's own come first.
        order = sorted(
            range(len(pairs)), key=lambda j: (-round(float(lines[j] @ image), 6), pairs[j][0] != i)
        )
        of_images.append(next(place for place, j in enumerate(order) if pairs[j][0] == i))
    return [100 * np.mean(np.array(ranks) < k) for ranks in (of_captions, of_images) for k in (1, 5, 10)]


def run(name, store, data):
    benchmark = registered()[name](Context(data=data))
    return benchmark, np.asarray(benchmark.items(store, benchmark.images(0), 0))


@pytest.mark.parametrize("name", ["flickr30k", "dci", "urban-1k", "coco"])
def test_recall_is_that_of_loops_over_open_clip(store, data, clip, name):
    benchmark, scores = run(f"retrieval {name}", store, data)
    expected = recalls_by_loops(clip, benchmark.set)
    assert scores.shape == (COUNT, 7) and 0 < np.mean(expected) < 100
    sums = scores.sum(0)
    found = [*(100 * sums[:3] / sums[3]), *(100 * scores[:, 4:].mean(0))]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(100 * benchmark.figure(scores.mean(0)), np.mean(expected))


def test_the_parts_of_the_queries_make_no_difference(store, data, monkeypatch):
    _, whole = run("retrieval flickr30k", store, data)
    monkeypatch.setattr(recall, "CHUNK", 3)
    _, parts = run("retrieval flickr30k", store, data)
    assert (whole == parts).all()


def test_ranks_by_hand():
    images = torch.eye(3)
    lines = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.9], [0.0, 0.8, 0.1]])
    # The first line is a caption of images 0 and 1, the second one of 1 too, and stands before in images 2.
    scores = recall.hits(images, lines, [[0], [0, 1], [2]])
    at_one = scores[:, [0, 3, 4]].tolist()
    assert at_one == [[1, 1, 1], [0, 2, 0], [0, 1, 0]]
    assert scores[:, 1].tolist() == [1, 2, 1]  # every rank is below 5


def test_shared_captions_do_not_count_against_an_images_own():
    images = torch.eye(2)
    shared = torch.tensor([[0.6, 0.6], [0.1, 0.7]])
    scores = recall.hits(images, shared, [[0], [0, 1]])
    assert scores[:, 4].tolist() == [
        1,
        1,
    ]  # image 0's only caption is the nearest, though image 1 has it too


def test_the_bootstrap_draws_images_with_their_captions(store, data):
    """The figure of drawn images is the recall of their captions and of them, each as often as it was drawn."""
    benchmark, scores = run("retrieval coco", store, data)
    drawn = np.random.default_rng(0).integers(0, COUNT, COUNT)
    queries = [hit for i in drawn for hit in [scores[i, :3]]]
    captions = sum(len(benchmark.set.captions[i]) for i in drawn)
    expected = [*(np.sum(queries, 0) / captions), *scores[drawn, 4:].mean(0)]
    weights = np.bincount(drawn, minlength=COUNT) / COUNT
    assert float(benchmark.figure(weights @ scores)) == pytest.approx(np.mean(expected))
    both = statistics.compare(benchmark.name, scores[None], scores[None], benchmark.figure)
    assert both.interval() == (0, 0)


def test_sets_are_what_the_files_say(data):
    flickr = registered()["retrieval flickr30k"](Context(data=data)).set
    assert [file.name for file in flickr.files] == [f"{100 + i}.jpg" for i in range(COUNT)]
    assert [list(several) for several in flickr.captions] == [texts(i, counts(i)) for i in range(COUNT)]
    coco = registered()["retrieval coco"](Context(data=data)).set
    assert [sorted(several) for several in coco.captions] == [
        sorted(texts(i, counts(i))) for i in range(COUNT)
    ]
    dci = registered()["retrieval dci"](Context(data=data)).set
    assert len(dci.files) == COUNT and dci.files[0].name == "sa_1543967.jpg"
    assert dci.captions[0] == ("A red square.  It is number 0.".replace("  ", " "),)
    assert dci.captions[-1][0].startswith(
        f"{texts(11)[0]} Much more is to be said of it. Much"
    )  # test's last is image 11
    urban = registered()["retrieval urban-1k"](Context(data=data)).set
    assert urban.captions[2] == ("the square is blue a photo of a blue square and noise 2",)


def test_karpathys_coco_is_found_in_either_years_folders(data, tmp_path):
    by_2017 = registered()["retrieval coco-karpathy"](Context(data=data)).set
    assert [str(file.relative_to(data / "coco")) for file in by_2017.files] == [
        "train2017/000000391895.jpg",
        "val2017/000000391897.jpg",
    ]
    save(tmp_path / "coco" / "val2014" / "COCO_val2014_000000391895.jpg", 0)
    save(tmp_path / "coco" / "val2014" / "COCO_val2014_000000391897.jpg", 2)
    (tmp_path / "caption_datasets").mkdir()
    (tmp_path / "caption_datasets" / "dataset_coco.json").write_bytes(
        (data / "coco" / "dataset_coco.json").read_bytes()
    )
    benchmark = registered()["retrieval coco-karpathy"](Context(data=tmp_path))
    assert type(benchmark).missing(benchmark.context) is None
    assert all(file.is_file() and file.parent.name == "val2014" for file in benchmark.set.files)
    assert benchmark.set.captions == by_2017.captions


def test_what_is_missing_says_what_to_put_where(tmp_path):
    for name, words in {
        "flickr30k": "flickr30k/dataset_flickr30k.json or caption_datasets/dataset_flickr30k.json",
        "dci": "densely_captioned_images/photos",
        "urban-1k": "Urban1k",
        "coco": "coco/annotations/captions_val2017.json",
        "coco-karpathy": "coco/val2014 or coco/train2017",
    }.items():
        assert words in registered()[f"retrieval {name}"].missing(Context(data=tmp_path))


def test_broken_data_are_refused(data, tmp_path):
    file = tmp_path / "broken.json"

    def refused(content, message, load=lambda: captioned.karpathy_flickr30k(file, tmp_path)):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(DataError, match=message) as error:
            load()
        assert "broken.json" in str(error.value)

    entry = karpathy_entry(0, "1.jpg", "test", 2)
    refused("{", "no readable JSON")
    refused([], "no usable `images`")
    refused({"images": [{**entry, "split": 3}]}, "no usable `split`")
    refused({"images": [{**entry, "sentences": None}]}, "no usable `sentences`")
    refused({"images": [{**entry, "sentences": [{"tokens": []}]}]}, "no usable `raw`")
    refused({"images": [{**entry, "filename": 1}]}, "no usable `filename`")
    refused({"images": [{**entry, "split": "val"}]}, "no image of `flickr30k test` has a caption")
    refused({"images": [entry]}, "no usable `cocoid`", lambda: captioned.karpathy_coco(file, tmp_path))

    def coco():
        return captioned.coco_format("coco", file, tmp_path)

    refused({"images": []}, "no usable `annotations`", coco)
    refused({"images": [], "annotations": [{"image_id": 1}]}, "no usable `caption`", coco)
    refused({"images": [{"id": 1}], "annotations": []}, "no usable `file_name`", coco)
    refused({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}, "has a caption", coco)

    refused(
        {"train": "112956-data.json"}, "no map of splits", lambda: captioned.dci(file, tmp_path, tmp_path)
    )
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"test": ["broken.json"]}))
    annotation = {"image": "a.jpg", "short_caption": "a"}
    refused(
        annotation, "no usable `extra_caption`", lambda: captioned.dci(splits, tmp_path, tmp_path / "photos")
    )
    splits.write_text(json.dumps({"test": ["gone-data.json"]}))
    with pytest.raises(DataError, match="gone-data.json"):
        captioned.dci(splits, tmp_path, tmp_path)

    with pytest.raises(DataError, match="holds no .txt"):
        captioned.urban1k(tmp_path)
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="1.txt: is no readable text"):
        captioned.urban1k(tmp_path)
    (tmp_path / "caption" / "1.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"image/1.jpg: there is no such file, and annotations name it"):
        captioned.urban1k(tmp_path).images()


def test_images_without_captions_are_left_out_with_a_count(tmp_path, caplog):
    (tmp_path / "caption").mkdir()
    for name, text in (("1", "a dog"), ("2", " ...\n"), ("3", "")):
        (tmp_path / "caption" / f"{name}.txt").write_text(text)
    with caplog.at_level("WARNING"):
        assert captioned.urban1k(tmp_path).captions == [("a dog",)]
    assert "2 images without a caption" in caplog.text


def test_changed_annotations_are_another_set(data, tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "caption").mkdir()
    (tmp_path / "image" / "1.jpg").write_bytes((data / "Urban1k" / "image" / "00001.jpg").read_bytes())
    (tmp_path / "caption" / "1.txt").write_text("a dog")
    first = captioned.urban1k(tmp_path).images().key
    (tmp_path / "caption" / "1.txt").write_text("a cat or two")
    assert captioned.urban1k(tmp_path).images().key != first


def test_the_whole_suite(data, tmp_path, clip):
    arguments = ["--model", demo_tower.NAME, "--pretrained", "demo", "--data", str(data), "--seeds", "1"]
    arguments += ["--compare", str(demo_tower.WEIGHTS_FILE)]
    suite = ",".join(
        f"retrieval {name}" for name in ("flickr30k", "dci", "urban-1k", "coco", "coco-karpathy")
    )
    assert evaluate.main([*arguments, "--suite", suite, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"].removeprefix("retrieval "): row for row in results["benchmarks"]}
    assert {name for name, row in rows.items() if row["in_domain"]} == {"coco", "coco-karpathy"}
    assert [rows[name]["n"] for name in ("flickr30k", "dci", "urban-1k", "coco")] == [COUNT] * 4
    for name in ("flickr30k", "coco"):
        found = registered()[f"retrieval {name}"](Context(data=data)).set
        assert rows[name]["base"] == pytest.approx(np.mean(recalls_by_loops(clip, found)), abs=1e-3)
    (family,) = results["families"]
    counted = [rows[name]["base"] for name in ("flickr30k", "dci", "urban-1k")]
    assert family["base"] == pytest.approx(np.mean(counted), abs=1e-3) and family["n"] == 3 * COUNT
    assert family["difference"] == family["low"] == family["high"] == 0
