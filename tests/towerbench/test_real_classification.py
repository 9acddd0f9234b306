"""Zero-shot, few-shot and robustness of the real suite, on tiny sets that lie on disk as the true ones do."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import by_names
from PIL import Image

from towerbench import Context, FeatureStore, captions, registered
from towerbench.errors import DataError
from towerbench.readout import chosen_on_validation
from towerbench.real import classification, few_shot, robustness, sources, zero_shot

COLOURS = {"n01440764": (200, 30, 30), "n01443537": (30, 200, 30), "n01484850": (30, 30, 200)}


def encoded(colour, seed=0, size=(40, 60), suffix="jpeg") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.integers(-25, 25, (*size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix)
    return buffer.getvalue()


def folders(root: Path, names, count=3, suffix="JPEG", seed=0) -> None:
    for name, colour in zip(names, COLOURS.values(), strict=False):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"image_{i}.{suffix}").write_bytes(encoded(colour, seed + i))


def webdataset(root: Path, splits=("train", "test"), count=10) -> None:
    """As clip-benchmark's export writes it."""
    root.mkdir(parents=True)
    (root / "classnames.txt").write_text("red\ngreen\nblue\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c} stuff\n")
    for split in splits:
        (root / split).mkdir()
        (root / split / "nshards.txt").write_text("2\n")
        for shard in range(2):
            with tarfile.open(root / split / f"{shard}.tar", "w") as archive:
                for i in range(count):
                    webp = encoded(list(COLOURS.values())[i % 3], i, suffix="webp")
                    for suffix, data in (("cls", str(i % 3).encode()), ("webp", webp)):
                        member = tarfile.TarInfo(f"s{i:07d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))


def objectnet(root: Path) -> None:
    """Two classes that ImageNet has, one of them as two classes, and one that it has not."""
    names = [f"words, {i}" for i in range(1000)]
    order = np.random.default_rng(0).permutation(1000)  # line i of the list is class order[i] of ImageNet
    mappings = root / "mappings"
    mappings.mkdir(parents=True)
    (mappings / "imagenet_to_label_2012_v2").write_text("".join(f"{names[place]}\n" for place in order))
    shared = {"Air freshener": names[3], "Chair": f"{names[1]}; {names[2]}"}
    label_of = {"air_freshener": "Air freshener", "chair": "Chair", "zipper": "Zipper"}
    for name, content in (
        ("pytorch_to_imagenet_2012_id", {str(place): i for i, place in enumerate(order)}),
        ("objectnet_to_imagenet_1k", shared),
        ("folder_to_objectnet_label", label_of),
    ):
        (mappings / f"{name}.json").write_text(json.dumps(content))
    folders(root / "images", label_of, suffix="png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    folders(root / "imagenet" / "val", COLOURS)
    folders(root / "imagenet" / "train", COLOURS, count=6, seed=50)
    folders(root / "imagenetv2-matched-frequency-format-val", ("0", "1", "2"), suffix="jpeg")
    folders(root / "imagenet-a", ("n01498041", "n01531178"), suffix="jpg")
    folders(root / "sketch", COLOURS)
    objectnet(root / "objectnet-1.0")
    webdataset(root / "wds_vtab-svhn")
    return root


WANTED = {
    "zero-shot imagenet-r": "imagenet-r .ImageNet-R",
    "kNN imagenet-sketch": "imagenet-sketch or sketch",
    "retrieval flickr30k": "flickr30k/dataset_flickr30k.json or caption_datasets/dataset_flickr30k.json",
    "retrieval dci": "densely_captioned_images/photos",
    "retrieval urban-1k": "Urban1k",
    "retrieval coco": "coco/annotations/captions_val2017.json",
    "retrieval coco-karpathy": "coco/val2014 or coco/train2017",
    "captioning nocaps-out": "nocaps/images or nocaps/val .*, coco/annotations/captions_train2017.json",
    "vqa vqav2": "coco/val2014 or coco/val2017",
}


@pytest.mark.parametrize("name", WANTED)
def test_what_is_missing_says_what_to_put_where(data, tmp_path, monkeypatch, name):
    cls = registered()[name]
    assert cls.missing(Context()).startswith("needs --data")
    assert re.search(WANTED[name], cls.missing(Context(data=tmp_path)))
    assert registered()["zero-shot imagenet"].missing(Context(data=data)) is None
    assert "development" in cls.missing(Context(data=data, split="development"))
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    assert ("pycocoevalcap" in cls.missing(Context(data=tmp_path))) == ("captioning" in name)


def test_labels_are_imagenets_classes(data):
    whole = classification.imagenet_like(data / "imagenet" / "val", 1000)
    assert whole.names == ["tench", "goldfish", "great white shark"]
    assert list(whole.labels) == [0] * 3 + [1] * 3 + [2] * 3
    by_number = classification.imagenet_like(data / "imagenetv2-matched-frequency-format-val", 1000)
    assert by_number.names == whole.names
    some = classification.imagenet_like(data / "imagenet-a", 200)
    assert some.names == ["stingray", "goldfinch"]  # n01498041 and n01531178 in WordNet
    assert len(whole.templates) == 80 and all(t.count("{}") == 1 for t in whole.templates)


def test_objectnet_maps_onto_imagenet(data):
    found = classification.objectnet(data / "objectnet-1.0")
    assert found.names == ["air freshener", "chair"] and found.imagenet == [(3,), (1, 2)]
    assert list(found.labels) == [0] * 3 + [1] * 3
    assert next(iter(zero_shot.images_of(found, "o").make())).shape == (36, 56, 3)  # less two on each side


def test_webdataset_reads_what_the_tars_hold(data):
    found = classification.webdataset(data / "wds_vtab-svhn" / "test")
    assert found.names == ["red", "green", "blue"] and found.templates == ["a photo of {}.", "{} stuff"]
    assert list(found.labels) == [i % 3 for i in range(10)] * 2
    for source, label in zip(found.sources, found.labels, strict=True):
        colour = sources.decoded(source.read(), source.file).mean((0, 1))
        assert colour.argmax() == label


def test_zero_shot_is_the_nearest_name(store, run):
    benchmark, hits = run("zero-shot imagenet")
    names = [(name,) for name in ("tench", "goldfish", "great white shark")]
    similar = (
        store.embeddings(benchmark.images(0)["test"]) @ by_names(store, names, benchmark.set.templates).T
    )
    assert hits.tolist() == (similar.argmax(1).numpy() == benchmark.set.labels).tolist()


@pytest.mark.parametrize("name", ["imagenet-sketch", "vtab/svhn"])
@pytest.mark.parametrize("method", ["linear probe", "kNN"])
def test_few_shot_tells_colours_apart(data, run, name, method):
    assert registered()[f"{method} {name}"].missing(Context(data=data)) is None
    assert run(f"{method} {name}")[1].mean() == 1


def test_few_shot_on_classes_that_stand_for_several(store, run, monkeypatch):
    """ObjectNet's class is any of its classes of ImageNet; scores that say so are counted right."""
    asked = []

    def says(train, held, classes):
        asked.append(classes)
        found = torch.zeros(6, classes)
        found[:3, 3] = found[3:, 2] = 1
        found[:, 7] = 2  # a class that the set does not have
        return lambda features: found

    monkeypatch.setitem(few_shot.METHODS, "kNN", says)
    assert run("kNN objectnet", store=FeatureStore(store.tower))[1].all() and asked == [1000]


def test_draws_depend_on_seed_alone(of):
    benchmark = of("kNN vtab/svhn")
    (one, _), (same, _), (other, _) = (benchmark.drawn(seed) for seed in (0, 0, 1))
    assert one.sources == same.sources != other.sources and len(one.sources) == 16
    train, held = of("kNN imagenet").drawn(0)
    assert not set(train.sources) & set(held.sources) and set(train.labels) == set(held.labels) == {0, 1, 2}


def test_a_probe_is_trained_once_for_imagenet_and_its_relatives(store, run, monkeypatch):
    fresh, trained = FeatureStore(store.tower), []

    def counting(*arguments):
        trained.append(chosen_on_validation(*arguments))
        return trained[-1]

    monkeypatch.setattr(few_shot, "chosen_on_validation", counting)
    for name in ("imagenet", "imagenet-v2", "imagenet-sketch"):
        benchmark, hits = run(f"linear probe {name}", store=fresh)
        images = benchmark.images(0)
        rows = [
            (store.embeddings(images[part]), torch.tensor(drawn.labels))
            for part, drawn in zip(("train", "held"), benchmark.drawn(0), strict=True)
        ]
        alone = chosen_on_validation(*rows, 1000).predict(store.embeddings(images["test"]))
        assert hits.tolist() == (alone == torch.tensor(benchmark.test.set.labels)).tolist()
    assert len(trained) == 1
    run("linear probe imagenet", seed=1, store=fresh)
    run("linear probe vtab/svhn", store=fresh)
    assert len(trained) == 3
    fresh.close()


def test_what_is_drawn_is_looked_up_once(tmp_path, of, monkeypatch):
    folders(tmp_path / "imagenet" / "train", COLOURS)
    webdataset(tmp_path / "wds_vtab-dtd")
    read = []
    for name in ("imagenet_folders", "webdataset"):
        function = getattr(few_shot, name)
        monkeypatch.setattr(few_shot, name, lambda *of, call=function: read.append(of) or call(*of))
    benchmarks = [
        of(f"{method} {name}", tmp_path) for method in few_shot.METHODS for name in ("imagenet", "vtab/dtd")
    ]
    for benchmark in benchmarks:
        assert benchmark.drawn(0) == benchmark.drawn(0)
    assert len(read) == 2
    benchmarks[-1].drawn(1)  # the tars were just read
    assert len(read) == 2


def test_benchmarks_on_the_same_images_draw_the_same_items(data, of):
    context = Context(data=data)
    for name, tested in zero_shot.BY_NAME.items():
        if tested.missing(context):
            continue
        same = [registered()[f"{what} {name}"] for what in ("zero-shot", "linear probe", "kNN")]
        assert {cls.item_set for cls in same} == {name}
        assert len({of(cls.name).images(0)["test"].identity for cls in same}) == 1
        # Some of the images alone.
        assert registered()[f"robustness {name}"].item_set == ""


def test_a_task_of_vtab_without_images_to_train_on(tmp_path):
    webdataset(tmp_path / "wds_vtab-svhn", ("test",))
    context = Context(data=tmp_path)
    assert registered()["zero-shot vtab/svhn"].missing(context) is None
    assert registered()["robustness vtab/svhn"].missing(context) is None
    for method in ("linear probe", "kNN"):
        reason = registered()[f"{method} vtab/svhn"].missing(context)
        assert "wds_vtab-svhn/train or " in reason and "svhn/test" not in reason
    webdataset(tmp_path / "wds_vtab-dtd", ("train",))
    assert "wds_vtab-dtd/test" in registered()["zero-shot vtab/dtd"].missing(context)


def test_neighbours_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    votes = few_shot.neighbours(train, torch.tensor([0, 1, 1]), 2, torch.tensor([[1.0, 0.0]]), 2)
    np.testing.assert_allclose(votes.numpy(), [[1, np.exp(-0.2 / 0.07)]], rtol=1e-5)


def test_robustness(run, monkeypatch):
    monkeypatch.setattr(robustness, "COUNT", 4)
    benchmark, hits = run("robustness objectnet")
    assert hits.shape == (4, 20) and len(benchmark.set.labels) == 4
    made = list(benchmark.images(0)["test"].make())
    assert len(made) == 80 and made[0].shape == (224, 224, 3)


def test_broken_folders_of_imagenet_are_refused(tmp_path):
    (tmp_path / "n01440764").mkdir()
    with pytest.raises(DataError, match="hold no images"):
        classification.imagenet_like(tmp_path, 1000)
    (tmp_path / "dogs").mkdir()
    with pytest.raises(DataError, match="dogs.*no class of ImageNet"):
        classification.imagenet_like(tmp_path, 1000)
    with pytest.raises(DataError, match="is no readable image"):
        sources.decoded(b"no image", "a.jpg")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test/nshards.txt", b"3", "says 3, and there are 2"),
        ("test/1.tar", b"no archive", "1.tar: is no readable tar"),
        ("classnames.txt", b"red\n", "classnames.txt has 1 lines"),
        ("classnames.txt", b"caf\xe9", "classnames.txt: is no readable text"),
    ],
)
def test_broken_webdatasets_are_refused(tmp_path, file, content, message):
    webdataset(tmp_path / "w", ("test",))
    (tmp_path / "w" / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        classification.webdataset(tmp_path / "w" / "test")


def test_the_command_leaves_out_what_is_not_there(data, command, tmp_path):
    results, rows = command(data, "zero-shot vtab/svhn,zero-shot imagenet-r", seeds=1)
    assert list(rows) == ["zero-shot vtab/svhn"]
    assert "imagenet-r" in results["left_out"]["zero-shot imagenet-r"]
    assert "Not run: zero-shot imagenet-r" in (tmp_path / "evaluation" / "report.md").read_text()
