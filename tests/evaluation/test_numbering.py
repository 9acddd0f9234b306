"""Figures do not depend on what the ids of a data set are, nor on what people's tools write into masks."""

import copy
import json
import random

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_api
from test_average_precision import NAMES, Sample, by_pycocotools, same, tied
from test_heads import IDS, NAME, guesses, run, truth  # noqa: F401  truth: a fixture

from towerbench.captions import cider_by_image
from visft.errors import DataError
from visft.evaluation import HeadsEvaluator
from visft.evaluation.average_precision import COCOMetric
from visft.evaluation.caption_metrics import caption_scores

# From the position in the file to an id.
IDS_OF = {
    "from 0": lambda n: n,
    "negative": lambda n: -n - 1,
    "texts": lambda n: f"img_{n}",
    "hashes": lambda n: 2**63 + 7919 * (97 - n),
    "beyond 64 bits": lambda n: 10**30 - n,
    "mixed": lambda n: n if n % 3 else str(n),
}


def renamed(sample: Sample, own) -> Sample:
    """A copy with other ids of images and annotations; of categories, others in the same order."""
    sample = copy.deepcopy(sample)
    images = {image["id"]: own(n) for n, image in enumerate(sample.images)}
    for image in sample.images:
        image["id"] = images[image["id"]]
    for entry in (*sample.annotations, *sample.results):
        entry["image_id"] = images[entry["image_id"]]
    for n, annotation in enumerate(sample.annotations):
        annotation["id"] = own(n)
    return sample


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_average_precision_is_that_of_any_other_ids(tmp_path, task):
    sample = tied()  # equal scores: the order of the images counts too
    plain = COCOMetric(sample.write(tmp_path))(sample.results, task)
    assert 1 < plain["AP"] < 99
    for kind, own in IDS_OF.items():
        other = renamed(sample, own)
        found = COCOMetric(other.write(tmp_path))(other.results, task)
        np.testing.assert_equal(found, plain, kind)


def test_the_plain_figures_are_pycocotools_own(tmp_path):
    """On a file whose images are not in the order of their ids."""
    sample = tied()
    random.Random(0).shuffle(sample.images)
    file = sample.write(tmp_path)
    same(COCOMetric(file)(sample.results, "segm", NAMES), by_pycocotools(file, sample.results, "segm"))


def test_results_of_strange_images_are_refused(tmp_path):
    sample = tied()
    with pytest.raises(DataError, match="image id 'x' is not among its 30"):
        COCOMetric(sample.write(tmp_path))([sample.results[0] | {"image_id": "x"}], "bbox")


def test_masks_as_tools_write_them(tmp_path):
    """Run lengths as a list; a sliver of two points first, for which COCO's tools take the whole list for boxes."""
    sample = tied()
    plain = COCOMetric(sample.write(tmp_path))(sample.results, "segm")
    for annotation in sample.annotations[::2]:
        x, y, w, h = annotation["bbox"]
        polygon = [x, y, x + w, y + h / 4, x + w, y + h, x + w / 3, y + h]
        annotation["segmentation"] = [[1, 1, 9, 9], polygon, []]
        annotation["area"] = None
    for annotation in sample.annotations[1::2]:
        flat = mask_api.decode(annotation["segmentation"]).T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        annotation["segmentation"] = {"size": [sample.side, sample.side], "counts": counts}
        annotation["iscrowd"] = annotation["iscrowd"] or None
    np.testing.assert_equal(COCOMetric(sample.write(tmp_path))(sample.results, "segm"), plain)


def test_classes_of_one_name_keep_their_figures(truth):  # noqa: F811
    metadata = MetadataCatalog.get(NAME)
    names, outputs = metadata.thing_classes, [{"detection": p} for p in guesses(truth, 1, masks=False)]
    before = run(HeadsEvaluator(NAME, ("detection",)), truth, outputs)["detection/bbox"]
    metadata.as_dict()["thing_classes"][:] = ["bag", "bag", "cup"]
    try:
        found = run(HeadsEvaluator(NAME, ("detection",)), truth, outputs)["detection/bbox"]
    finally:
        metadata.as_dict()["thing_classes"][:] = ["seven", "thirty", "fifty-five"]
    assert names == ["seven", "thirty", "fifty-five"] and sorted(IDS) == [7, 30, 55]
    assert found["AP-bag (7)"] == before["AP-seven"] != before["AP-thirty"] == found["AP-bag (30)"]
    assert found["AP-cup"] == before["AP-fifty-five"] and "AP-bag" not in found


def test_masks_are_not_scored_where_some_are_missing(truth, tmp_path):  # noqa: F811
    body = json.loads(json.dumps(truth))
    del body["annotations"][3]["segmentation"]
    file = tmp_path / "some.json"
    file.write_text(json.dumps(body))
    metadata = MetadataCatalog.get("evaluation_test_some_masks")
    metadata.set(json_file=str(file), thing_classes=["seven", "thirty", "fifty-five"])
    metadata.set(thing_dataset_id_to_contiguous_id={7: 0, 30: 1, 55: 2})
    outputs = [{"segmentation": p} for p in guesses(truth, 1, masks=True)]
    try:
        found = run(HeadsEvaluator(metadata.name, ("segmentation",)), truth, outputs)
        whole = run(HeadsEvaluator(NAME, ("segmentation",)), truth, outputs)
    finally:
        MetadataCatalog.remove(metadata.name)
    assert set(found) == {"segmentation/bbox"}
    assert found["segmentation/bbox"]["AP"] == whole["segmentation/bbox"]["AP"]


@pytest.mark.parametrize("own", IDS_OF.values(), ids=IDS_OF)
def test_captions_of_any_ids(own):
    pytest.importorskip("pycocoevalcap")
    words = ["a dog runs", "two cats sleep on a bed", "a red bus", "the dog and the cat", "a bed"]
    references = {own(n): [text, text + " today"] for n, text in enumerate(words)}
    said = {own(n): words[n - 1] if n % 2 else words[n] for n in range(len(words))}
    plain = caption_scores(dict(enumerate(references.values())), {n: said[own(n)] for n in range(len(words))})
    assert caption_scores(references, said) == plain and 0 < plain["CIDEr"]
    assert list(cider_by_image(references, said)) == list(references)
