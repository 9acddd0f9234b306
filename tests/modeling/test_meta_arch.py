"""ViSFT: what its tower sees, which head gets what, what trains in which stage, what comes out."""

import numpy as np
import pytest
import shapes
import torch
from demo_models import build, config, losses_of, picture
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from safetensors.torch import save_file

from visft.errors import CheckpointError, ConfigError
from visft.modeling.heads import VISFT_HEADS_REGISTRY, VisftHead
from visft.modeling.meta_arch import UNLABELLED, ViSFT

STRIDE = 8  # of visft-tiny


@pytest.fixture(scope="module")
def shared() -> ViSFT:
    """A model that tests do not change, but for its stage and mode."""
    return build()


@pytest.fixture
def model(shared) -> ViSFT:
    shared.set_stage("heads")
    shared.zero_grad(set_to_none=True)
    return shared.train()


class Seen:
    """What goes into and comes out of a module; and how often."""

    def __init__(self, module: torch.nn.Module):
        self.inputs, self.outputs = [], []
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, arguments, output):
        self.inputs.append(arguments)
        self.outputs.append(output)


# What the tower sees


def test_images_are_normalised_then_padded_with_zeros(model):
    images = [picture((48, 64)), picture((52, 40), number=2)]
    seen = Seen(model.backbone)
    model(images)
    ((batch,),) = seen.inputs
    seen.handle.remove()
    # CLIP's own, as open_clip publishes them.
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert batch.shape == (2, 3, 56, 64)
    expected = np.zeros(batch.shape)
    for row, image in zip(expected, images, strict=True):
        height, width = image["image"].shape[1:]
        pixels = image["image"].numpy().transpose(1, 2, 0) / 255
        row[:, :height, :width] = ((pixels - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(batch.numpy(), expected, atol=1e-5)


def test_mean_and_std_are_the_towers_unless_the_config_says_otherwise():
    stock = get_cfg().MODEL
    clips = [122.7709, 116.7460, 104.0937], [68.5005, 66.6322, 70.3232]
    imagenet = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    for given, expected in (((stock.PIXEL_MEAN, stock.PIXEL_STD), clips), (imagenet, imagenet)):
        model = build("MODEL.PIXEL_MEAN", given[0], "MODEL.PIXEL_STD", given[1])
        np.testing.assert_allclose(model.pixel_mean.flatten(), expected[0], atol=1e-3)
        np.testing.assert_allclose(model.pixel_std.flatten(), expected[1], atol=1e-3)


@pytest.mark.parametrize("size", [(48, 64), (41, 57), (8, 8), (33, 40)])
def test_a_cell_is_padding_where_its_first_pixel_is(model, size):
    with torch.no_grad():
        inputs = model.extract([picture((48, 64)), picture(size, number=2)])
    mask = inputs.padding_mask
    assert inputs.features.shape[2:] == (6, 8) and inputs.padded_size == (48, 64)
    assert inputs.image_sizes == [(48, 64), size]
    assert not mask[0].any()
    for y in range(6):
        for x in range(8):
            assert bool(mask[1, y, x]) == (y * STRIDE >= size[0] or x * STRIDE >= size[1])


# Which head gets what


def test_each_head_gets_what_it_has_labels_for_from_one_pass(model):
    """The losses of a mixed batch are those of each head alone with its own images."""
    both, only_boxes = picture(number=1), picture(masks=False, number=2)
    nothing = picture(boxes=False, masks=False, number=3)
    model.heads.eval()  # no dropout: batches of different sizes would draw differently
    tower = Seen(model.backbone)
    losses = losses_of(model, [only_boxes, nothing, both])
    assert len(tower.inputs) == 1 and len(tower.inputs[0][0]) == 2
    tower.handle.remove()

    for name, images in (("detection", [only_boxes, both]), ("segmentation", [both])):
        inputs, head = model.extract(images), model.heads[name]
        torch.manual_seed(3)
        alone = head.losses(inputs, head.normalizers(images))
        assert len(alone) >= 3
        assert {key for key in losses if key.startswith(name)} == {f"{name}/{key}" for key in alone}
        for key, value in alone.items():
            torch.testing.assert_close(losses[f"{name}/{key}"], value, rtol=1e-5, atol=1e-6)


def test_losses_are_scalars_that_a_trainer_sums(model):
    losses = losses_of(model, [picture()])
    assert all(value.shape == () and torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    missing = [name for name, p in model.heads.named_parameters() if p.grad is None]
    assert not missing


def test_a_head_without_labels_costs_nothing(model):
    counted = [Seen(module) for module in model.heads["segmentation"].modules()]
    losses = losses_of(model, [picture(masks=False)])
    assert {name.split("/")[0] for name in losses} == {"detection"}
    assert not any(seen.inputs for seen in counted)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.heads["segmentation"].parameters())
    for seen in counted:
        seen.handle.remove()


def test_a_batch_without_labels_neither_runs_the_tower_nor_stops_a_trainer(model):
    tower = Seen(model.backbone)
    losses = model([picture(boxes=False, masks=False)])
    assert list(losses) == [UNLABELLED] and float(losses[UNLABELLED].detach()) == 0
    sum(losses.values()).backward()
    assert not tower.inputs
    assert all(p.grad is None for p in model.parameters())
    tower.handle.remove()


def test_loss_weights_are_factors_in_the_order_of_heads(model):
    plain = losses_of(model, [picture()])
    weighted = build("MODEL.VISFT.LOSS_WEIGHTS", (0.5, 3.0)).train()
    weighted.load_state_dict(model.state_dict())
    for name, value in losses_of(weighted, [picture()]).items():
        factor = 0.5 if name.startswith("detection") else 3.0
        torch.testing.assert_close(value, factor * plain[name])


# What trains


def test_stage_heads_builds_no_graph_through_the_tower(model):
    seen = Seen(model.backbone)
    losses = losses_of(model, [picture()])
    assert not seen.outputs[0]["last_feat"].requires_grad
    seen.handle.remove()
    sum(losses.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.modules())
    assert all(module.training for module in model.heads.modules())


def test_stage_lora_trains_lora_alone_through_heads_without_dropout():
    model = build("MODEL.VISFT.DETECTION.DROPOUT", 0.5, "VISFT.STAGES", ("lora",)).train()
    assert model.stage == "lora" and model.training
    assert not any(module.training for module in model.heads.modules())
    first, second = (losses_of(model, [picture()], seed) for seed in (1, 2))
    for name in (name for name in first if name.startswith("detection")):
        assert torch.equal(first[name], second[name]), "dropout was at work"
    sum(first.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("backbone.") and "lora_" in name for name in trained)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}

    model.set_stage("heads")
    first, second = (losses_of(model, [picture()], seed) for seed in (1, 2))
    assert not torch.equal(first["detection/loss_ce"], second["detection/loss_ce"])


def test_stages_can_follow_each_other(model):
    for stage, part in (("lora", "backbone."), ("heads", "heads."), ("lora", "backbone.")):
        model.set_stage(stage)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained and all(name.startswith(part) for name in trained)


def test_what_a_head_holds_fixed_stays_fixed():
    model = build()
    heads = dict(model.heads)
    heads["detection"].query_embeds.weight.requires_grad_(False)
    again = ViSFT(backbone=model.backbone, heads=heads)
    again.set_stage("lora")
    again.set_stage("heads")
    fixed = {name for name, p in again.heads.named_parameters() if not p.requires_grad}
    assert fixed == {"detection.query_embeds.weight"}


def test_evaluation_mode_is_evaluation_mode_in_each_stage(model):
    for stage in ("heads", "lora"):
        model.set_stage(stage)
        model.eval()
        assert not any(module.training for module in model.modules())
        assert isinstance(model([picture()]), list)
        model.train()
        assert isinstance(model([picture()]), dict)


# What comes out


def test_each_image_has_every_heads_output_and_instances(model):
    model.eval()
    images = [picture((48, 64)), picture((40, 40), number=2)]
    for image in images:
        del image["instances"]
    with torch.no_grad():
        outputs = model(images)
        inputs = model.extract(images)
        for name, head in model.heads.items():
            for output, alone in zip(outputs, head.inference(inputs), strict=True):
                assert torch.equal(output[name].scores, alone.scores)
    for image, output in zip(images, outputs, strict=True):
        assert set(output) == {"instances", "detection", "segmentation"}
        height, width = image["height"], image["width"]
        for found in output.values():
            assert found.image_size == (height, width) and len(found)
            boxes = found.pred_boxes.tensor
            assert boxes.min() >= 0 and (boxes <= torch.tensor([width, height, width, height])).all()
            assert ((0 <= found.pred_classes) & (found.pred_classes < 3)).all()
        assert output["instances"] is output["segmentation"]
        masks = output["segmentation"].pred_masks
        assert masks.shape[1:] == (height, width)
        tight = BitMasks(masks).get_bounding_boxes().tensor
        assert torch.equal(output["segmentation"].pred_boxes.tensor, tight)


def test_instances_are_the_detectors_where_no_head_has_masks():
    model = build("MODEL.VISFT.HEADS", ("detection",)).eval()
    image = {"image": picture()["image"]}  # nothing else is needed; the size is then the picture's own
    (output,) = model([image])
    assert output["instances"] is output["detection"]
    assert output["instances"].image_size == (48, 64)


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("MODEL.VISFT.HEADS", ("detection", "segmentaton")), "segmentaton.*nearest.*segmentation"),
        (("MODEL.VISFT.HEADS", ("detection", "detection")), "each once"),
        (("MODEL.VISFT.HEADS", ()), "detection, segmentation"),
        (("MODEL.VISFT.LOSS_WEIGHTS", (1.0,)), "LOSS_WEIGHTS"),
        (("VISFT.STAGES", ("head",)), "nearest.*heads"),
        (("INPUT.FORMAT", "BGR"), "RGB"),
        (("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0]), "PIXEL_MEAN"),
        (("MODEL.BACKBONE.NAME", "build_clip_vit_fpn_backbone"), "build_clip_vit_backbone"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(options, words):
    with pytest.raises(ConfigError, match=words):
        build(*options)


def test_stage_lora_without_lora_is_said():
    model = build("VISFT.STAGES", ("heads",))
    with pytest.raises(ConfigError, match=r"lora\.inject"):
        model.set_stage("lora")


# Weights of heads


def test_heads_start_from_head_files(model, tmp_path):
    file = tmp_path / "heads.safetensors"
    save_file({f"heads.{name}": value for name, value in model.heads.state_dict().items()}, str(file))
    torch.manual_seed(99)
    other = build_model(config("MODEL.VISFT.HEAD_FILES", (str(file),)))
    for name, value in model.heads.state_dict().items():
        assert torch.equal(other.heads.state_dict()[name], value), name

    with pytest.raises(CheckpointError, match="REINIT_CLASSES"):
        build("MODEL.VISFT.HEAD_FILES", (str(file),), "MODEL.VISFT.DETECTION.NUM_CLASSES", 5)
    anew = build(
        *("MODEL.VISFT.HEAD_FILES", (str(file),), "MODEL.VISFT.DETECTION.NUM_CLASSES", 5),
        *("MODEL.VISFT.DETECTION.REINIT_CLASSES", True),
    )
    kept, fresh = model.heads["detection"].state_dict(), anew.heads["detection"].state_dict()
    differ = {name for name in kept if not torch.equal(kept[name], fresh[name])}
    assert {name.split(".")[0] for name in differ} == {"class_embeds"}


# detectron2's own trainer and mapper


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A registered COCO data set of three classes, whose masks are polygons."""
    made = shapes.make(tmp_path_factory.mktemp("stock"), images=6, size=(48, 64))
    register_coco_instances("meta_arch_test", {}, *map(str, made))
    yield "meta_arch_test"
    DatasetCatalog.remove("meta_arch_test")
    MetadataCatalog.remove("meta_arch_test")


class Trainer(DefaultTrainer):
    """detectron2's trainer; it leaves to its users which evaluators they want."""

    @classmethod
    def build_evaluator(cls, cfg, name):
        return COCOEvaluator(name, tasks=("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",))


@pytest.mark.parametrize(
    ("mask_on", "mask_format", "stages"),
    [
        (True, "polygon", ("heads", "lora")),
        (True, "bitmask", ("lora",)),
        (False, "polygon", ("heads",)),
    ],
)
def test_a_stock_trainer_trains_the_first_stage(world, tmp_path, mask_on, mask_format, stages):
    cfg = config(
        *("DATASETS.TRAIN", (world,), "DATASETS.TEST", (world,), "DATALOADER.NUM_WORKERS", 0),
        *("MODEL.VISFT.DETECTION.NUM_CLASSES", 0, "MODEL.VISFT.SEGMENTATION.NUM_CLASSES", 0),
        *("MODEL.MASK_ON", mask_on, "INPUT.MASK_FORMAT", mask_format, "VISFT.STAGES", stages),
        *("SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", ()),
        *("OUTPUT_DIR", str(tmp_path), "INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MIN_SIZE_TEST", 64),
    )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    # Classes come from the data set's metadata, which no loader had filled when the model was built.
    assert [head.labels.num_classes for head in trainer.model.heads.values()] == [3, 3]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    if stages[0] == "lora":
        assert moved and all("lora_" in name for name in moved)
    else:
        trained = {name.split(".")[1] for name in moved}
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert trained == ({"detection", "segmentation"} if mask_on else {"detection"})
        assert all(name.startswith("heads.") for name in moved)
    results = trainer._last_eval_results
    assert set(results) == ({"bbox", "segm"} if mask_on else {"bbox"})
    if mask_on:
        assert 0 <= results["segm"]["AP50"] <= 100


# Parts that are not ours


class Brightness(VisftHead):
    """A head without counts that says a word: nothing in the meta-architecture is about boxes or masks."""

    def __init__(self, *_):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def has_labels(self, image):
        return "bright" in image

    def normalizers(self, images):
        return torch.zeros(0)

    def losses(self, inputs, normalizers):
        assert normalizers.shape == (0,)
        return {"loss": (self.scale * inputs.features).square().mean()}

    def inference(self, inputs):
        return ["bright"] * len(inputs.images)


def test_a_head_may_say_words(model):
    own = ViSFT(backbone=model.backbone, heads={"words": Brightness()}).train()
    losses = own([picture(), picture(number=2) | {"bright": True}])
    assert list(losses) == ["words/loss"]
    losses["words/loss"].backward()
    assert own.heads["words"].scale.grad is not None
    assert own.eval()([picture()]) == [{"words": "bright"}]
    assert "Brightness" not in VISFT_HEADS_REGISTRY
