"""RegionTextHead: regions named by the text encoder, against the formula computed on open_clip's own model."""

import json

import open_clip
import pytest
import torch
from annotated_images import annotated
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets.lvis import _get_lvis_instances_meta_v1
from detectron2.layers import ShapeSpec
from safetensors.torch import save_file
from torch.nn import functional as F

from visft import model_zoo
from visft.classes.class_names import stuff_words, synonyms, words
from visft.errors import ConfigError, DataError
from visft.modeling.backbone import CLIPViT, class_embeddings, lora, open_clip_models
from visft.modeling.heads import HeadInputs, LabelSpace, RegionTextHead, build_head
from visft.modeling.heads.common.federated import Federated

NAMES = [("dog",), ("traffic light",), ("bird",), ("cup", "mug"), ("knife",)]
PROMPTS = ("a photo of a {}.", "the {}")
SIZE = (64, 64)


@pytest.fixture(scope="module")
def tower() -> CLIPViT:
    return CLIPViT.from_open_clip("visft-tiny", "demo").eval()


def head_of(tower: CLIPViT, **options) -> RegionTextHead:
    head = RegionTextHead(names=NAMES, prompts=PROMPTS, **options)
    head.bind(tower)
    return head


def losses(
    head: RegionTextHead, features: torch.Tensor, images: list[dict], normalizers=None
) -> torch.Tensor:
    """Of the images with objects."""
    padding = torch.zeros(len(images), *features.shape[-2:], dtype=torch.bool)
    normalizers = head.normalizers(images) if normalizers is None else normalizers
    found = head.losses(HeadInputs(features, padding, images, [SIZE] * len(images), SIZE), normalizers)
    assert list(found) == ["loss_text"]
    return found["loss_text"]


@pytest.fixture
def labelled(images) -> list[dict]:
    return [images[0], images[2], images[3]]


def direct_logits(
    images: list[dict], pixels: torch.Tensor, scale: float, kind: str = "masks"
) -> torch.Tensor:
    """From open_clip alone: its tokens, its projection, its text encoder."""
    clip = open_clip.create_model("visft-tiny", pretrained="demo").eval()
    tokenizer = open_clip.get_tokenizer("visft-tiny")
    clip.visual.output_tokens = True
    _, tokens = clip.visual(pixels)  # after the last norm
    texts = []
    for row in NAMES:
        lines = [prompt.format(name) for name in row for prompt in PROMPTS]
        texts.append(F.normalize(clip.encode_text(tokenizer(lines), normalize=True).mean(0), dim=0))
    found = []
    for image, patches in zip(images, tokens, strict=True):
        large = patches.view(8, 8, -1).repeat_interleave(8, 0).repeat_interleave(8, 1)
        for mask, box in zip(image["instances"].gt_masks.tensor, image["instances"].gt_boxes.tensor.int().tolist(),
                             strict=True):  # fmt: skip
            if kind == "boxes":
                mask = torch.zeros_like(mask)
                mask[box[1] : box[3], box[0] : box[2]] = True
            found.append(F.normalize(large[mask].mean(0) @ clip.visual.proj, dim=0))
    return scale * torch.stack(found) @ torch.stack(texts).T


@pytest.mark.parametrize("kind", ["masks", "boxes"])
@torch.no_grad()
def test_loss_is_the_direct_formula_on_open_clips_model(tower, labelled, kind):
    pixels = torch.randn(3, 3, 64, 64)
    classes = torch.cat([image["instances"].gt_classes for image in labelled])
    scale = float(open_clip.create_model("visft-tiny", pretrained="demo").logit_scale.exp())
    for given, used in ((0.0, scale), (30.0, 30.0)):
        head = head_of(tower, regions=kind, logit_scale=given, weight=2.0)
        found = losses(head, tower(pixels)["last_feat"], labelled)
        expected = F.cross_entropy(direct_logits(labelled, pixels, used, kind), classes)
        torch.testing.assert_close(found, 2 * expected, rtol=2e-4, atol=1e-5)
    boxless = [{**image, "instances": without_masks(image["instances"])} for image in labelled]
    torch.testing.assert_close(
        losses(head_of(tower), tower(pixels)["last_feat"], boxless),
        losses(head_of(tower, regions="boxes"), tower(pixels)["last_feat"], labelled),
    )


def without_masks(instances):
    found = type(instances)(instances.image_size)
    found.gt_boxes, found.gt_classes = instances.gt_boxes, instances.gt_classes
    return found


def test_gradient_is_that_of_finite_differences(tower, labelled):
    head, features = head_of(tower, logit_scale=10.0), torch.randn(3, 192, 8, 8)
    features.requires_grad_(True)
    (gradient,) = torch.autograd.grad(losses(head, features, labelled), features)
    for seed in range(3):
        direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
        step = 1e-2 * direction
        with torch.no_grad():
            slope = (losses(head, features + step, labelled) - losses(head, features - step, labelled)) / 2e-2
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_everything_is_float32_under_autocast_and_with_weights_in_half_precision(labelled, dtype):
    features = torch.randn(3, 192, 8, 8)
    tower = CLIPViT.from_open_clip("visft-tiny", "demo").eval()
    expected = losses(head_of(tower), features, labelled)
    with torch.autocast("cpu", dtype):
        assert torch.equal(losses(head_of(tower), features, labelled), expected)
    half = features.to(dtype)
    with torch.autocast("cpu", dtype):
        assert torch.equal(
            losses(head_of(tower), half, labelled), losses(head_of(tower), half.float(), labelled)
        )
    head = head_of(tower)
    tower.tower.proj.data = tower.tower.proj.data.to(dtype)
    rounded = losses(head, features, labelled)
    tower.tower.proj.data = tower.tower.proj.data.float()
    assert rounded.dtype == torch.float32 and torch.equal(rounded, losses(head, features, labelled))


def siglip(tmp_path) -> CLIPViT:
    """A SigLIP in miniature: timm's attention pooler, no linear projection, logit scale and bias."""
    config = {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 64, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map",
                       "timm_proj": "none", "timm_model_pretrained": False},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    file = tmp_path / "sigmoid-miniature.json"
    file.write_text(json.dumps(config))
    open_clip_models.open_clip().add_model_config(file)
    torch.manual_seed(0)
    clip = open_clip.create_model(file.stem)
    clip.logit_scale.data += 0.3
    weights = tmp_path / "siglip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, weights)
    return CLIPViT.from_open_clip(file.stem, str(weights)).eval()


@torch.no_grad()
def test_a_siglip_has_its_sigmoid_its_scale_and_its_bias(labelled, tmp_path):
    tower = siglip(tmp_path)
    head = head_of(tower)
    clip = tower.base_clip()
    assert head.sigmoid and head.logit_bias == -10
    assert head.logit_scale == pytest.approx(clip.logit_scale.exp())
    features = torch.randn(3, 192, 4, 4)
    means = torch.cat(
        [
            torch.stack([map_.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, m].mean(1) for m in
                         image["instances"].gt_masks.tensor])
            for map_, image in zip(features, labelled, strict=True)
        ]
    )  # fmt: skip
    pooled = tower.tower.trunk.fc_norm(tower.tower.trunk.attn_pool(means[:, None]))
    regions = F.normalize(tower.tower.head(tower.tower.trunk.head(pooled)), dim=-1)
    lines = [[prompt.format(name) for name in row for prompt in PROMPTS] for row in NAMES]
    tokenizer = open_clip.get_tokenizer("sigmoid-miniature")
    texts = [F.normalize(clip.encode_text(tokenizer(row), normalize=True).mean(0), dim=0) for row in lines]
    logits = clip.logit_scale.exp() * regions @ torch.stack(texts).T + clip.logit_bias
    classes = torch.cat([image["instances"].gt_classes for image in labelled])
    target = F.one_hot(classes, len(NAMES)).float()
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(classes)
    torch.testing.assert_close(losses(head, features, labelled), expected, rtol=1e-4, atol=1e-5)
    softmax = head_of(tower, loss="softmax")
    expected = F.cross_entropy(logits, classes)  # a bias moves no softmax
    torch.testing.assert_close(losses(softmax, features, labelled), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_names_that_take_no_part_are_no_negatives(tower, images):
    """Federated, as LVIS asks for: the softmax is over the names of the images and those that are drawn."""
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])
    head = head_of(tower, federated=Federated(3, weights))
    image, features = images[2], torch.randn(1, 192, 8, 8)
    normalizers = head.normalizers([image])
    assert normalizers.tolist() == [1, 0, 0, 1, 0, 0, 0]
    torch.manual_seed(4)
    chosen = head.federated.draw(normalizers[1:])[:-1]
    assert chosen.sum() == 3 and chosen[2]
    torch.manual_seed(4)
    found = losses(head, features, [image])
    full = head_of(tower)
    region = full.inference(HeadInputs(features, None, [image], [SIZE], SIZE))[0]
    mask = image["instances"].gt_masks.tensor
    doubled = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)  # the original image is twice as large
    logits = region.logits(doubled)[0]
    torch.testing.assert_close(found, logits[chosen].logsumexp(0) - logits[2], rtol=1e-4, atol=1e-4)


def test_what_inference_names_is_what_training_classifies(tower, labelled):
    head, features = head_of(tower), torch.randn(3, 192, 8, 8)
    total = torch.zeros(())
    for image, found in zip(
        labelled, head.inference(HeadInputs(features, None, labelled, [SIZE] * 3, SIZE)), strict=True
    ):
        masks = image["instances"].gt_masks.tensor.repeat_interleave(2, 1).repeat_interleave(2, 2)
        total = total + F.cross_entropy(found.logits(masks), image["instances"].gt_classes, reduction="sum")
        boxes = image["instances"].gt_boxes
        boxed = found.logits(boxes.tensor * 2)
        assert boxed.shape == (len(boxes), len(NAMES))
        assert torch.equal(head.probabilities(boxed).argmax(1), boxed.argmax(1))
    torch.testing.assert_close(losses(head, features, labelled), total / 9, rtol=1e-4, atol=1e-5)


def test_other_names_are_classifiers_too(tower):
    head = head_of(tower)
    found = head.class_text([("fox",), ("dog",)])
    torch.testing.assert_close(found.embeddings[1], head.embeddings[0])
    assert found.names == ("fox", "dog")


def test_no_weights_and_nothing_in_the_state(tower):
    head = head_of(tower)
    assert not head.trainable and list(head.parameters()) == [] and head.state_dict() == {}


def test_images_without_objects_have_no_labels(tower, images):
    head = head_of(tower)
    assert [head.has_labels(image) for image in images] == [True, False, True, True]
    assert head.normalizers(images).tolist() == [9]


def test_the_gradient_reaches_lora_through_the_frozen_projection(labelled):
    tower = CLIPViT.from_open_clip("visft-tiny", "demo")
    lora.inject(tower, rank=2, alpha=2.0)
    tower.set_train("lora")
    head = head_of(tower)
    losses(head, tower(torch.randn(3, 3, 64, 64))["last_feat"], labelled).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in tower.named_parameters() if "lora_B" in n)
    assert tower.tower.proj.grad is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("traffic light", ("traffic light",)),
        ("bow_(weapon)", ("bow weapon",)),
        ("Cabinet/shelf", ("Cabinet", "shelf")),
        ("Moniter/TV", ("Moniter", "TV")),
        ("Pillow", ("Pillow",)),
        ("__", ("__",)),
    ],
)
def test_names_become_words(name, expected):
    assert words(name) == expected


def test_stuff_names_become_words():
    names = ("wall-other-merged", "floor-wood", "tree-merged", "food-other-merged")
    assert [stuff_words(name) for name in names] == [("wall",), ("floor wood",), ("tree",), ("food",)]


def test_lvis_has_its_synonyms():
    metadata = Metadata(name="lvis-like", evaluator_type="lvis", **_get_lvis_instances_meta_v1())
    found = synonyms(metadata)
    assert len(found) == 1203 and found[0] == ("aerosol can", "spray can")
    assert ("bow weapon",) in found
    own = Metadata(name="own", thing_classes=["a", "b"], class_synonyms=[["a", "alpha"], ["b_c"]])
    assert synonyms(own) == [("a", "alpha"), ("b c",)]


def test_names_that_the_tokenizer_reads_alike_are_one_class(tower):
    head = RegionTextHead(names=[("dog",), ("Dog ",), ("cat", "kitten"), ("kitten", "cat")], prompts=PROMPTS)
    head.bind(tower)
    assert head.rows.tolist() == [0, 0, 1, 1] and head.embeddings.shape == (2, 192)
    assert head.names == ("dog", "cat")


def test_embeddings_are_computed_once(tower, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = head_of(tower).embeddings
    (file,) = (tmp_path / "visft").glob("class-text-*.safetensors")
    monkeypatch.setattr(class_embeddings, "_compute", lambda text, tokens: 1 / 0)
    assert torch.equal(head_of(tower).embeddings, first)
    with pytest.raises(ZeroDivisionError):  # other prompts are other tokens
        RegionTextHead(names=NAMES, prompts=("{} ?",)).bind(tower)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_bytes(b"cut off")
    assert torch.equal(head_of(tower).embeddings, first)


def test_a_bare_tower_is_refused(tower, images):
    head = RegionTextHead(names=NAMES)
    with pytest.raises(ConfigError, match="needs the text encoder of the tower's CLIP"):
        head.bind(CLIPViT(tower.tower))
    with pytest.raises(ConfigError, match="call bind"):
        head.backbone  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": []}, "have no names"),
        ({"names": [("a",), ()]}, "have no names"),
        ({"prompts": ()}, "PROMPTS is empty"),
        ({"prompts": ("a dog",)}, "PROMPTS has `a dog`"),
        ({"prompts": ("{} and {}",)}, "each with one"),
        ({"regions": "circles"}, "known: boxes, masks"),
        ({"loss": "hinge"}, "known: auto, sigmoid, softmax"),
        ({"logit_scale": -1.0}, "expected 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RegionTextHead(**({"names": NAMES} | options))


def test_classes_beyond_the_names_are_refused(tower):
    with pytest.raises(DataError, match="annotated with class 9"):
        head_of(tower).normalizers([annotated(1, SIZE, [[0, 0, 9, 9]], [9])])


def test_a_data_set_without_names_is_refused():
    DatasetCatalog.register("nameless", lambda: [])
    try:
        cfg = model_zoo.get_config("visft_demo")
        cfg.DATASETS.TRAIN = ("nameless",)
        with pytest.raises(ConfigError, match="nameless has no thing_classes, which MODEL.VISFT.REGION_TEXT"):
            build_head(cfg, "region_text", ShapeSpec(channels=192, stride=8))
    finally:
        DatasetCatalog.remove("nameless")
        MetadataCatalog.pop("nameless", None)


def test_labels_have_no_gap(tower):
    assert head_of(tower).labels == LabelSpace(5)
