"""RegionTextEvaluator: accuracies of naming annotated regions, against a brute count on open_clip's own model."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures.masks import polygons_to_bitmask
from PIL import Image
from pycocotools import mask as mask_api
from torch.nn import functional as F

from visft import model_zoo
from visft.errors import DataError
from visft.evaluation import build_evaluator
from visft.evaluation.region_naming import RegionTextEvaluator, annotated_mask
from visft.modeling.backbone import CLIPViT
from visft.modeling.heads import HeadInputs, RegionTextHead

SIZE = (64, 64)
NAMES = {3: "dog", 5: "traffic light", 8: "bird", 9: "knife", 12: "cup", 20: "apple", 30: "ship"}
STUFF = {50: "tree-merged", 40: "floor-wood", 60: "sky-other-merged"}
PROMPTS = ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module")
def head() -> RegionTextHead:
    """Trained on other names than those of the data sets."""
    head = RegionTextHead(names=[("cat",), ("dog",)], prompts=PROMPTS)
    head.bind(CLIPViT.from_open_clip("visft-tiny", "demo").eval())
    return head


def polygon(rng: np.random.Generator) -> list[float]:
    x, y = rng.integers(0, 30, 2)
    w, h = rng.integers(8, 30, 2)
    return [float(v) for v in (x, y, x + w, y, x + w // 2, y + h)]


def content(seed: int = 0) -> dict:
    """Eight images with polygons, run lengths of both kinds, crowds; one image with nothing, no ship."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(1, 9):
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        for kind in rng.choice(["polygon", "rle", "counts", "crowd"], 0 if number == 8 else 4):
            points = polygon(rng)
            rle = mask_api.merge(mask_api.frPyObjects([points], *SIZE))
            segmentation = [points]
            if kind in ("rle", "crowd"):
                segmentation = {"size": list(SIZE), "counts": rle["counts"].decode()}
            if kind == "counts":
                flat = mask_api.decode(rle).flatten(order="F")
                edges = np.flatnonzero(np.diff(flat)) + 1
                runs = np.diff([0, *edges, flat.size]).tolist()
                segmentation = {"size": list(SIZE), "counts": [0, *runs] if flat[0] else runs}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(rng.choice(list(NAMES)[:6])),
                }
                | {"bbox": mask_api.toBbox(rle).tolist(), "area": float(mask_api.area(rle))}
                | {"segmentation": segmentation, "iscrowd": int(kind == "crowd")}
            )
    categories = [{"id": key, "name": name} for key, name in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "instances_tiny.json").write_text(json.dumps(content()))
    register_coco_instances("region_text_tiny", {}, str(tmp_path / "instances_tiny.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove("region_text_tiny")
    MetadataCatalog.pop("region_text_tiny", None)


def features_of(image_id: int) -> torch.Tensor:
    return torch.randn(1, 192, 8, 8, generator=torch.Generator().manual_seed(image_id))


def run(evaluator: RegionTextEvaluator, head: RegionTextHead, image_ids=range(1, 9)) -> dict[str, float]:
    evaluator.reset()
    feed(evaluator, head, image_ids)
    return flatten_results_dict(evaluator.evaluate())


def feed(evaluator: RegionTextEvaluator, head: RegionTextHead, image_ids) -> None:
    for number in image_ids:
        image = {"image_id": number, "height": SIZE[0], "width": SIZE[1]}
        (output,) = head.inference(HeadInputs(features_of(number), None, [image], [SIZE], SIZE))
        evaluator.process([image], [{"region_text": output}])


@torch.no_grad()
def brute(regions: list[tuple[int, np.ndarray, int]], names: list[list[str]]) -> dict[str, float]:
    """From open_clip alone. regions: image, mask of pixels, class."""
    clip = open_clip.create_model("visft-tiny", pretrained="demo").eval()
    tokenizer = open_clip.get_tokenizer("visft-tiny")
    texts = torch.stack(
        [
            F.normalize(clip.encode_text(tokenizer([p.format(n) for n in row for p in PROMPTS]),
                                         normalize=True).mean(0), dim=0)
            for row in names
        ]
    )  # fmt: skip
    first, five, by_class = [], [], {}
    for image_id, mask, target in regions:
        large = features_of(image_id)[0].repeat_interleave(8, 1).repeat_interleave(8, 2)
        mean = large[:, torch.from_numpy(mask)].mean(1) @ clip.visual.proj  # maps have passed the last norm
        order = (texts @ mean).argsort(descending=True).tolist()
        first.append(order[0] == target)
        five.append(target in order[:5])
        by_class.setdefault(target, []).append(order[0] == target)
    return {
        "top1": 100 * np.mean(first),
        "top5": 100 * np.mean(five),
        "class_mean": 100 * np.mean([np.mean(hits) for hits in by_class.values()]),
    }


def box_mask(box: list[float]) -> np.ndarray:
    x, y, w, h = (round(v) for v in box)
    mask = np.zeros(SIZE, bool)
    mask[y : y + h, x : x + w] = True
    return mask


def things(rows: list[int] | None = None) -> dict[str, list]:
    """The regions of `content` by mask and by box; `rows`: the name of each class."""
    found = {"mask": [], "box": []}
    rows = rows or list(range(len(NAMES)))
    for annotation in content()["annotations"]:
        if annotation["iscrowd"]:
            continue
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            mask = polygons_to_bitmask(segmentation, *SIZE)
        elif isinstance(segmentation["counts"], list):
            flat = np.repeat(np.arange(len(segmentation["counts"])) % 2, segmentation["counts"])
            mask = flat.reshape(SIZE, order="F").astype(bool)
        else:
            mask = mask_api.decode(segmentation).astype(bool)
        target = rows[sorted(NAMES).index(annotation["category_id"])]
        found["mask"].append((annotation["image_id"], mask, target))
        found["box"].append((annotation["image_id"], box_mask(annotation["bbox"]), target))
    return found


def check(found: dict[str, float], kind: str, expected: dict[str, float]) -> None:
    for metric, value in expected.items():
        assert found[f"region_text/{kind}/{metric}"] == pytest.approx(value), (kind, metric)


def test_figures_are_those_of_a_brute_count(folder, head):
    assert {type(a["segmentation"]) for a in content()["annotations"]} == {list, dict}
    found = run(RegionTextEvaluator("region_text_tiny", ["region_text"]), head)
    assert len(found) == 6
    names = [[NAMES[key]] for key in sorted(NAMES)]
    for kind, regions in things().items():
        expected = brute(regions, names)
        assert 0 < expected["top1"] < expected["top5"] < 100
        check(found, kind, expected)


def segments(folder, place) -> list[tuple[int, np.ndarray, int]]:
    """Writes panoptic files: three bands of stuff an image, a thing, a crowd; returns the stuff's regions."""
    rng = np.random.default_rng(5)
    place.mkdir()
    annotations, regions = [], []
    for number in range(1, 7):
        ids = np.zeros(SIZE, np.int64)
        info = []
        for band, category in enumerate([*rng.choice(list(STUFF), 3), 3, 40]):
            key = 70000 + 300 * band + number
            ids[12 * band : 12 * band + 12] = key
            info.append({"id": key, "category_id": int(category), "iscrowd": int(band == 4)})
            if band < 3:
                regions.append((number, ids == key, list(STUFF).index(category)))
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)
        Image.fromarray(colours).save(place / f"{number}.png")
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": info})
    categories = [{"id": key, "name": name, "isthing": 0} for key, name in STUFF.items()]
    categories.insert(1, {"id": 3, "name": "dog", "isthing": 1})
    file = folder / "panoptic_tiny.json"
    file.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    return regions


@pytest.mark.parametrize("where", ["beside", "above", "metadata"])
def test_stuff_is_named_among_stuff(folder, head, where):
    place = {"beside": folder, "above": folder.parent, "metadata": folder / "x"}[where] / "panoptic_tiny"
    place.parent.mkdir(exist_ok=True)
    regions = segments(folder, place)
    if where == "metadata":
        file = folder / "panoptic_tiny.json"
        file = file.rename(folder / "x" / "other.json")
        MetadataCatalog.get("region_text_tiny").set(panoptic_json=str(file), panoptic_root=str(place))
    try:
        found = run(RegionTextEvaluator("region_text_tiny", ["region_text"]), head)
    finally:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    expected = brute(regions, [["tree"], ["floor wood"], ["sky"]])
    assert 0 < expected["top1"] < 100
    check(found, "stuff", expected)


def test_synonyms_are_averaged_and_equal_names_are_one(folder, head):
    DatasetCatalog.get("region_text_tiny")
    rows = [["dog", "puppy"], ["bird"], ["Bird "], ["knife"], ["cup", "mug"], ["apple"], ["ship"]]
    MetadataCatalog.get("region_text_tiny").class_synonyms = rows
    found = run(RegionTextEvaluator("region_text_tiny", ["region_text"]), head)
    merged = things([0, 1, 1, 2, 3, 4, 5])["mask"]
    check(found, "mask", brute(merged, [rows[0], rows[1], *rows[3:]]))


def evaluate_rank(rank: int, parts: list[RegionTextEvaluator], folder: str) -> None:
    """One of several real processes, each with the counts of its own images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(parts))
    try:
        found = flatten_results_dict(parts[rank].evaluate())
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def test_processes_add_their_counts(folder, head, tmp_path):
    whole = run(RegionTextEvaluator("region_text_tiny", ["region_text"]), head)
    parts = [RegionTextEvaluator("region_text_tiny", ["region_text"]) for _ in range(3)]
    for part, image_ids in zip(parts, (range(1, 4), range(4, 8), [8]), strict=True):
        feed(part, head, image_ids)
    assert parts[2]._counts == {}  # its one image has no annotations
    # Forked: each has its part as it is here.
    torch.multiprocessing.start_processes(
        evaluate_rank, args=(parts, str(tmp_path)), nprocs=len(parts), start_method="fork"
    )
    assert json.loads((tmp_path / "0.json").read_text()) == whole
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (1, 2)] == [{}, {}]


def test_names_that_the_head_knows_are_not_embedded_again(folder, head, monkeypatch):
    names = [(NAMES[key],) for key in sorted(NAMES)]
    same = RegionTextHead(names=names, prompts=PROMPTS)
    same.bind(head.backbone)
    expected = run(RegionTextEvaluator("region_text_tiny", ["region_text"]), head)
    monkeypatch.setattr(RegionTextHead, "class_text", lambda *args: 1 / 0)
    assert run(RegionTextEvaluator("region_text_tiny", ["region_text"]), same) == expected


def test_build_evaluator_keeps_such_heads_from_average_precision(folder):
    cfg = model_zoo.get_config("visft_demo")
    cfg.MODEL.VISFT.HEADS = ("region_text",)
    assert isinstance(build_evaluator(cfg, "region_text_tiny"), RegionTextEvaluator)
    cfg.MODEL.VISFT.HEADS = ("detection", "region_text")
    average_precision, naming = build_evaluator(cfg, "region_text_tiny")._evaluators
    assert average_precision.heads == ("detection",) and naming.heads == ("region_text",)


def test_what_is_broken_is_named(folder, head):
    evaluator = RegionTextEvaluator("region_text_tiny", ["region_text"])
    with pytest.raises(DataError, match="region_text_tiny has no image_id 99"):
        feed(evaluator, head, [99])
    segments(folder, folder / "panoptic_tiny")
    evaluator = RegionTextEvaluator("region_text_tiny", ["region_text"])
    Image.new("RGB", (3, 2)).save(folder / "panoptic_tiny" / "1.png")
    with pytest.raises(DataError, match=r"1\.png: is 3 x 2, its image 64 x 64"):
        feed(evaluator, head, [1])
    (folder / "panoptic_tiny" / "2.png").write_bytes(b"cut off")
    with pytest.raises(DataError, match=r"2\.png: is no readable image"):
        feed(evaluator, head, [2])
    (folder / "panoptic_tiny.json").write_text("{}")
    with pytest.raises(DataError, match="no readable panoptic annotations"):
        RegionTextEvaluator("region_text_tiny", ["region_text"])
    DatasetCatalog.register("region_text_nameless", lambda: [])
    try:
        with pytest.raises(DataError, match="region_text_nameless has no thing_classes"):
            RegionTextEvaluator("region_text_nameless", ["region_text"])
    finally:
        DatasetCatalog.remove("region_text_nameless")
        MetadataCatalog.pop("region_text_nameless", None)


def test_a_bitmap_is_a_mask_already():
    bitmap = np.eye(4, dtype=np.uint8)
    assert (annotated_mask(bitmap, (4, 4)) == bitmap.astype(bool)).all()
