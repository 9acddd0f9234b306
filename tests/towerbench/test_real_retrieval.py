"""Retrieval of the real suite: sets that lie on disk as true ones do, and recall computed by loops over open_clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from towerbench import recall
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
    about = {"sentids": ids, "imgid": number, "sentences": sentences, "split": split, "filename": filename}
    return about | more


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


@pytest.mark.parametrize("name", ["flickr30k", "dci", "urban-1k", "coco"])
def test_recall_is_that_of_loops_over_open_clip(run, clip, monkeypatch, name):
    benchmark, scores = run(f"retrieval {name}")
    expected = recalls_by_loops(clip, benchmark.set)
    assert scores.shape == (COUNT, 7) and 0 < np.mean(expected) < 100
    sums = scores.sum(0)
    found = [*(100 * sums[:3] / sums[3]), *(100 * scores[:, 4:].mean(0))]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(100 * benchmark.figure(scores.mean(0)), np.mean(expected))
    monkeypatch.setattr(recall, "CHUNK", 3)
    assert (run(f"retrieval {name}")[1] == scores).all()


def test_ranks_by_hand():
    images = torch.eye(3)
    lines = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.9], [0.0, 0.8, 0.1]])
    # The first line is a caption of images 0 and 1, the second one of 1 too, and stands before in images 2.
    scores = recall.hits(images, lines, [[0], [0, 1], [2]])
    at_one = scores[:, [0, 3, 4]].tolist()
    assert at_one == [[1, 1, 1], [0, 2, 0], [0, 1, 0]]
    assert scores[:, 1].tolist() == [1, 2, 1]  # every rank is below 5


def test_shared_captions_do_not_count_against_an_images_own():
    scores = recall.hits(torch.eye(2), torch.tensor([[0.6, 0.6], [0.1, 0.7]]), [[0], [0, 1]])
    # Image 0's only caption is the nearest, though image 1 has it too.
    assert scores[:, 4].tolist() == [1, 1]


def test_the_bootstrap_draws_images_with_their_captions(run):
    """The figure of drawn images is the recall of their captions and of them, each as often as it was drawn."""
    benchmark, scores = run("retrieval coco")
    drawn = np.random.default_rng(0).integers(0, COUNT, COUNT)
    captions = sum(len(benchmark.set.captions[i]) for i in drawn)
    expected = [*(scores[drawn, :3].sum(0) / captions), *scores[drawn, 4:].mean(0)]
    weights = np.bincount(drawn, minlength=COUNT) / COUNT
    assert float(benchmark.figure(weights @ scores)) == pytest.approx(np.mean(expected))


def test_sets_are_what_the_files_say(of):
    flickr, coco, dci, urban = (
        of(f"retrieval {name}").set for name in ("flickr30k", "coco", "dci", "urban-1k")
    )
    expected = [sorted(texts(i, counts(i))) for i in range(COUNT)]
    assert [file.name for file in flickr.files] == [f"{100 + i}.jpg" for i in range(COUNT)]
    assert [sorted(several) for several in flickr.captions] == expected
    assert [sorted(several) for several in coco.captions] == expected
    assert len(dci.files) == COUNT and dci.files[0].name == "sa_1543967.jpg"
    assert dci.captions[0] == ("A red square. It is number 0.",)
    # The last of the test split is image 11.
    assert dci.captions[-1][0].startswith(f"{texts(11)[0]} Much more is to be said of it. Much")
    assert urban.captions[2] == ("the square is blue a photo of a blue square and noise 2",)


def test_karpathys_coco_is_found_in_either_years_folders(data, of, tmp_path):
    by_2017 = of("retrieval coco-karpathy").set
    found = [str(file.relative_to(data / "coco")) for file in by_2017.files]
    assert found == ["train2017/000000391895.jpg", "val2017/000000391897.jpg"]
    for number in (391895, 391897):
        save(tmp_path / "coco" / "val2014" / f"COCO_val2014_{number:012d}.jpg", 0)
    (tmp_path / "caption_datasets").mkdir()
    shutil.copy(data / "coco" / "dataset_coco.json", tmp_path / "caption_datasets")
    benchmark = of("retrieval coco-karpathy", tmp_path)
    assert benchmark.missing(benchmark.context) is None
    assert all(file.is_file() and file.parent.name == "val2014" for file in benchmark.set.files)
    assert benchmark.set.captions == by_2017.captions


ENTRY = karpathy_entry(0, "1.jpg", "test", 2)


def _flickr(file):
    return captioned.karpathy_flickr30k(file, file.parent)


def _coco(file):
    return captioned.coco_format("coco", file, file.parent)


def _dci(file):
    return captioned.dci(file, file.parent, file.parent)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (_flickr, "{", "no readable JSON"),
        (_flickr, [], "no usable `images`"),
        (_flickr, {"images": [{**ENTRY, "split": 3}]}, "no usable `split`"),
        (_flickr, {"images": [{**ENTRY, "sentences": None}]}, "no usable `sentences`"),
        (_flickr, {"images": [{**ENTRY, "sentences": [{"tokens": []}]}]}, "no usable `raw`"),
        (_flickr, {"images": [{**ENTRY, "filename": 1}]}, "no usable `filename`"),
        (_flickr, {"images": [{**ENTRY, "split": "val"}]}, "no image of `flickr30k test` has a caption"),
        (lambda file: captioned.karpathy_coco(file, file.parent), {"images": [ENTRY]}, "no usable `cocoid`"),
        (_coco, {"images": []}, "no usable `annotations`"),
        (_coco, {"images": [], "annotations": [{"image_id": 1}]}, "no usable `caption`"),
        (_coco, {"images": [{"id": 1}], "annotations": []}, "no usable `file_name`"),
        (_coco, {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}, "has a caption"),
        (_dci, {"train": "112956-data.json"}, "no map of splits"),
        (_dci, {"test": ["broken.json"]}, "no usable `short_caption`"),
        (_dci, {"test": ["gone-data.json"]}, "gone-data.json: is no readable JSON"),
    ],
)
def test_broken_annotations_are_refused(tmp_path, read, content, message):
    file = tmp_path / "broken.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        read(file)
    assert "broken.json" in str(error.value) or "gone" in message


def test_broken_folders_are_refused(tmp_path):
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
    (tmp_path / "caption").mkdir()
    save(tmp_path / "image" / "1.jpg", 1)
    keys = set()
    for text in ("a dog", "a cat or two"):
        (tmp_path / "caption" / "1.txt").write_text(text)
        keys.add(captioned.urban1k(tmp_path).images().key)
    assert len(keys) == 2


def test_the_whole_suite(data, command, of, clip):
    names = [f"retrieval {name}" for name in ("flickr30k", "dci", "urban-1k", "coco", "coco-karpathy")]
    results, rows = command(data, ",".join(names), seeds=1)
    assert {name: row["in_domain"] for name, row in rows.items()} == {name: "coco" in name for name in names}
    assert [rows[name]["n"] for name in names[:4]] == [COUNT] * 4
    expected = np.mean(recalls_by_loops(clip, of("retrieval coco").set))
    assert rows["retrieval coco"]["base"] == pytest.approx(expected, abs=1e-3)
    (family,) = results["families"]
    counted = [rows[name]["base"] for name in names[:3]]
    assert family["base"] == pytest.approx(np.mean(counted), abs=1e-3) and family["n"] == 3 * COUNT
