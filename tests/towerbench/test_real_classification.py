"""Zero-shot, few-shot and robustness of the real suite, on tiny sets that lie on disk as the true ones do."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demoworld import tower as demo_tower
from towerbench import Context, FeatureStore, registered
from towerbench import __main__ as evaluate
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
                    label = i % 3
                    for suffix, data in (
                        ("cls", str(label).encode()),
                        ("webp", encoded(list(COLOURS.values())[label], i, suffix="webp")),
                    ):
                        member = tarfile.TarInfo(f"s{i:07d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))


def objectnet(root: Path) -> None:
    """Two classes that ImageNet has, one of them as two classes, and one that it has not."""
    ids, names = classification.imagenet_ids(), [f"words, {i}" for i in range(1000)]
    order = np.random.default_rng(0).permutation(1000)  # line i of the list is class order[i] of ImageNet
    mappings = root / "mappings"
    mappings.mkdir(parents=True)
    lines = [names[order[i]] for i in range(1000)]
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(
        json.dumps({str(order[i]): i for i in range(1000)})
    )
    shared = {"Air freshener": names[3], "Chair": f"{names[1]}; {names[2]}"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    label_of = {"air_freshener": "Air freshener", "chair": "Chair", "zipper": "Zipper"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(label_of))
    folders(root / "images", ("air_freshener", "chair", "zipper"), suffix="png")
    assert len(ids) == 1000


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


def run(name, store, data, seed=0):
    benchmark = registered()[name](Context(data=data))
    return benchmark, benchmark.items(store, benchmark.images(seed), seed)


def test_what_is_missing_says_what_to_put_where(data):
    cls = registered()["zero-shot imagenet-r"]
    assert "--data" in cls.missing(Context())
    assert "imagenet-r (ImageNet-R" in cls.missing(Context(data=data))
    assert registered()["zero-shot imagenet"].missing(Context(data=data)) is None
    assert "development" in registered()["zero-shot imagenet"].missing(
        Context(data=data, split="development")
    )
    assert "imagenet-sketch or sketch" in registered()["kNN imagenet-sketch"].missing(
        Context(data=data.parent / "no")
    )


def test_labels_are_imagenets_classes(data):
    whole = classification.imagenet_like(data / "imagenet" / "val", 1000)
    assert (
        whole.names == ["tench", "goldfish", "great white shark"]
        and list(whole.labels) == [0] * 3 + [1] * 3 + [2] * 3
    )
    by_number = classification.imagenet_like(data / "imagenetv2-matched-frequency-format-val", 1000)
    assert by_number.names == whole.names
    some = classification.imagenet_like(data / "imagenet-a", 200)
    assert some.names == ["stingray", "goldfinch"]  # n01498041 and n01531178 in WordNet
    assert len(whole.templates) == 80 and all(t.count("{}") == 1 for t in whole.templates)


def test_objectnet_maps_onto_imagenet(data):
    found = classification.objectnet(data / "objectnet-1.0")
    assert (
        found.names == ["air freshener", "chair"] and found.imagenet == [(3,), (1, 2)] and found.border == 2
    )
    assert list(found.labels) == [0] * 3 + [1] * 3
    assert next(zero_shot.without_border(np.zeros((40, 60, 3)), 2)).shape == (36, 56, 3)
    first = next(iter(zero_shot.images_of(found, "o").make()))
    assert first.shape == (36, 56, 3)


def test_webdataset_reads_what_the_tars_hold(data):
    found = classification.webdataset(data / "wds_vtab-svhn" / "test")
    assert found.names == ["red", "green", "blue"] and found.templates == ["a photo of {}.", "{} stuff"]
    assert list(found.labels) == [i % 3 for i in range(10)] * 2
    for source, label in zip(found.sources, found.labels, strict=True):
        colour = sources.decoded(source.read(), source.file).mean((0, 1))
        assert colour.argmax() == label


def test_zero_shot_is_the_nearest_name(store, data):
    benchmark, hits = run("zero-shot imagenet", store, data)
    embeddings = store.embeddings(benchmark.images(0)["test"])
    expected = []
    for embedding, label in zip(embeddings, benchmark.set.labels, strict=True):
        similar = []
        for name in ("tench", "goldfish", "great white shark"):
            texts = store.tower.text([template.format(name) for template in benchmark.set.templates])
            mean = texts.mean(0)
            similar.append(float(embedding @ mean / mean.norm()))
        expected.append(int(np.argmax(similar)) == label)
    assert hits.tolist() == expected


@pytest.mark.parametrize("name", ["imagenet-sketch", "vtab/svhn"])
@pytest.mark.parametrize("method", ["linear probe", "kNN"])
def test_few_shot_tells_colours_apart(store, data, name, method):
    assert registered()[f"{method} {name}"].missing(Context(data=data)) is None
    _, hits = run(f"{method} {name}", store, data)
    assert hits.mean() == 1


def test_few_shot_on_classes_that_stand_for_several(store, data, monkeypatch):
    """ObjectNet's class is any of its classes of ImageNet; scores that say so are counted right."""
    asked = []

    def says(train, held, classes):
        asked.append(classes)
        found = torch.zeros(6, classes)
        found[:3, 3] = found[3:, 2] = 1
        found[:, 7] = 2  # a class that the set does not have
        return lambda features: found

    monkeypatch.setitem(few_shot.METHODS, "kNN", says)
    assert run("kNN objectnet", FeatureStore(store.tower), data)[1].all() and asked == [1000]


def test_draws_depend_on_seed_alone(data):
    benchmark = registered()["kNN vtab/svhn"](Context(data=data))
    (one, _), (same, _), (other, _) = (benchmark.drawn(seed) for seed in (0, 0, 1))
    assert one.sources == same.sources != other.sources and len(one.sources) == 16
    train, held = registered()["kNN imagenet"](Context(data=data)).drawn(0)
    assert not set(train.sources) & set(held.sources) and set(train.labels) == set(held.labels) == {0, 1, 2}


def test_a_probe_is_trained_once_for_imagenet_and_its_relatives(store, data, monkeypatch):
    fresh, trained = FeatureStore(store.tower), []

    def counting(*arguments):
        trained.append(chosen_on_validation(*arguments))
        return trained[-1]

    monkeypatch.setattr(few_shot, "chosen_on_validation", counting)
    for name in ("imagenet", "imagenet-v2", "imagenet-sketch"):
        benchmark, hits = run(f"linear probe {name}", fresh, data)
        images = benchmark.images(0)
        rows = [
            (store.embeddings(images[part]), torch.tensor(drawn.labels))
            for part, drawn in zip(("train", "held"), benchmark.drawn(0), strict=True)
        ]
        alone = chosen_on_validation(*rows, 1000).predict(store.embeddings(images["test"]))
        assert hits.tolist() == (alone == torch.tensor(benchmark.test.set.labels)).tolist()
    assert len(trained) == 1
    run("linear probe imagenet", fresh, data, seed=1)
    run("linear probe vtab/svhn", fresh, data)
    assert len(trained) == 3
    fresh.close()


def test_what_is_drawn_is_looked_up_once(tmp_path, monkeypatch):
    folders(tmp_path / "imagenet" / "train", COLOURS)
    folders(tmp_path / "imagenet" / "val", COLOURS)
    webdataset(tmp_path / "wds_vtab-dtd")
    read = []
    for module, name in ((few_shot, "imagenet_folders"), (few_shot, "webdataset")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, function=function: read.append(args) or function(*args)
        )
    for method in ("linear probe", "kNN"):
        for name in ("imagenet", "vtab/dtd"):
            benchmark = registered()[f"{method} {name}"](Context(data=tmp_path))
            assert benchmark.drawn(0) == benchmark.drawn(0)
    assert len(read) == 2
    registered()["kNN vtab/dtd"](Context(data=tmp_path)).drawn(1)  # the tars were just read
    assert len(read) == 2


def test_benchmarks_on_the_same_images_draw_the_same_items(data):
    context = Context(data=data)
    for name, tested in zero_shot.BY_NAME.items():
        if tested.missing(context):
            continue
        same = [registered()[f"{what} {name}"] for what in ("zero-shot", "linear probe", "kNN")]
        assert {cls.item_set for cls in same} == {name}
        assert len({cls(context).images(0)["test"].identity for cls in same}) == 1
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


def test_robustness(store, data, monkeypatch):
    monkeypatch.setattr(robustness, "COUNT", 4)
    benchmark, hits = run("robustness objectnet", store, data)
    assert hits.shape == (4, 20) and len(benchmark.set.labels) == 4
    made = list(benchmark.images(0)["test"].make())
    assert len(made) == 80 and made[0].shape == (224, 224, 3)


def test_broken_data_are_refused(data, tmp_path):
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    with pytest.raises(DataError, match="hold no images"):
        classification.imagenet_like(tmp_path / "val", 1000)
    (tmp_path / "val" / "dogs").mkdir()
    with pytest.raises(DataError, match="dogs.*no class of ImageNet"):
        classification.imagenet_like(tmp_path / "val", 1000)
    with pytest.raises(DataError, match="is no readable image"):
        sources.decoded(b"no image", "a.jpg")
    webdataset(tmp_path / "w", ("test",))
    (tmp_path / "w" / "test" / "nshards.txt").write_text("3")
    with pytest.raises(DataError, match="says 3, and there are 2"):
        classification.webdataset(tmp_path / "w" / "test")
    (tmp_path / "w" / "test" / "nshards.txt").write_text("2")
    (tmp_path / "w" / "classnames.txt").write_text("red\n")
    with pytest.raises(DataError, match="classnames.txt has 1 lines"):
        classification.webdataset(tmp_path / "w" / "test")
    (tmp_path / "w" / "classnames.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="classnames.txt: is no readable text"):
        classification.webdataset(tmp_path / "w" / "test")


def test_the_command_leaves_out_what_is_not_there(data, tmp_path):
    arguments = ["--model", demo_tower.NAME, "--pretrained", "demo", "--data", str(data), "--seeds", "1"]
    suite = "zero-shot vtab/svhn,zero-shot imagenet-r"
    assert evaluate.main([*arguments, "--suite", suite, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["benchmarks"]] == ["zero-shot vtab/svhn"]
    assert "imagenet-r" in results["left_out"]["zero-shot imagenet-r"]
    assert "Not run: zero-shot imagenet-r" in (tmp_path / "report.md").read_text()
