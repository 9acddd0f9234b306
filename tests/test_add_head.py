"""The example of CONTRIBUTING.md: a head in one file and one config node."""

import importlib.util
import re

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from visft import model_zoo
from visft.modeling.heads import VISFT_HEADS_REGISTRY

EXAMPLE = "tests/examples/my_head.py"


def fenced(text: str, kind: str) -> list[str]:
    """The code blocks of a language in a Markdown text."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture(scope="module")
def example(root):
    """The example's module, imported as a user's would be."""
    spec = importlib.util.spec_from_file_location("my_head", root / EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del VISFT_HEADS_REGISTRY._obj_map["TagHead"]


def picture(classes: list[int], number: int) -> dict:
    """An image whose colour says which of three classes are on it."""
    colour = torch.tensor([255 * (index in classes) for index in range(3)], dtype=torch.uint8)
    instances = Instances((48, 48))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 40]]).repeat(len(classes), 1))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {
        "image": colour.view(3, 1, 1).expand(3, 48, 48).contiguous(),
        "instances": instances,
        "image_id": number,
    }


def test_contributing_shows_the_example_as_it_is(root):
    text = (root / "CONTRIBUTING.md").read_text()
    assert (root / EXAMPLE).read_text() in fenced(text, "python")
    assert len((root / EXAMPLE).read_text().splitlines()) <= 30


def test_the_example_trains_beside_the_detector(example, root):
    node = next(
        block
        for block in fenced((root / "CONTRIBUTING.md").read_text(), "python")
        if "cfg.MODEL.VISFT.TAGS" in block
    )
    cfg = model_zoo.get_config("visft_demo")
    exec(node, {"cfg": cfg, "CfgNode": CfgNode})  # the node that CONTRIBUTING.md shows
    cfg.MODEL.VISFT.HEADS = ("detection", "tags")
    cfg.MODEL.VISFT.HEAD_FILES = ()
    cfg.MODEL.VISFT.DETECTION.NUM_CLASSES = cfg.MODEL.VISFT.TAGS.NUM_CLASSES = 3
    cfg.MODEL.CLIP_VIT.PRETRAINED = ""
    model = build_model(cfg).train()
    assert type(model.heads["tags"]) is example.TagHead

    labels = [[0], [1], [2], [0, 1], [1, 2], []]
    images = [picture(classes, number) for number, classes in enumerate(labels, start=1)]
    losses = model(images)
    assert {"tags/loss_tags", "detection/loss_ce"} <= set(losses)

    optimizer = torch.optim.Adam(model.heads["tags"].parameters(), lr=0.02)
    with torch.no_grad():
        inputs = model.extract(images)
    head = model.heads["tags"]
    for _ in range(200):
        optimizer.zero_grad()
        loss = head.losses(inputs, head.normalizers(images))["loss_tags"]
        loss.backward()
        optimizer.step()
    outputs = model.eval()([{"image": image["image"]} for image in images])
    assert [output["tags"] for output in outputs] == [str(classes) for classes in labels]
    assert all(output["instances"] is output["detection"] for output in outputs)
