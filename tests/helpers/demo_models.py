"""Small models of the demo's config, and labelled images for them."""

import torch
from annotated_images import rectangles
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from visft import model_zoo
from visft.modeling.meta_arch import ViSFT


def config(*options):
    """The demo's config without its objective, its tower with random weights, LoRA in q and v, heads as small as they
    get, three classes."""
    cfg = model_zoo.get_config("visft_demo")
    lora = cfg.MODEL.LORA
    lora.RANK, lora.ALPHA, lora.TARGETS, lora.LAST_BLOCKS = 16, 16.0, ("q", "v"), 0
    node = cfg.MODEL.VISFT
    node.OBJECTIVES, node.ANCHOR.WEIGHT, node.ANCHOR.CROPS, node.ANCHOR.RECOLOR = (), 1.0, 0, False
    node.SELF_DISTILLATION.WEIGHT, node.REGION_TEXT.WEIGHT = 1.0, 1.0
    node.SELF_DISTILLATION.REGIONS, node.SELF_DISTILLATION.MAX_REGIONS = "grid", 16
    node.HEADS, node.HEAD_FILES = ("detection", "segmentation"), ()
    node.DETECTION.NUM_CLASSES = node.SEGMENTATION.NUM_CLASSES = 3
    node.DETECTION.NUM_QUERIES = node.SEGMENTATION.NUM_QUERIES = 6
    node.DETECTION.ENCODER_LAYERS = node.SEGMENTATION.ENCODER_LAYERS = 1
    node.DETECTION.DECODER_LAYERS = node.SEGMENTATION.DECODER_LAYERS = 2
    node.DETECTION.ENCODER_DIM = node.DETECTION.DECODER_DIM = node.SEGMENTATION.DIM = 32
    node.DETECTION.FEEDFORWARD_DIM = node.SEGMENTATION.FEEDFORWARD_DIM = 32
    node.SEGMENTATION.ENCODER_FEEDFORWARD_DIM = 32
    node.SEGMENTATION.NUM_POINTS = 64
    cfg.MODEL.CLIP_VIT.PRETRAINED = ""
    cfg.MODEL.LORA.RANK = 4
    cfg.merge_from_list(list(options))
    return cfg


def build(*options) -> ViSFT:
    torch.manual_seed(7)
    return build_model(config(*options))


def picture(size=(48, 64), *, boxes=True, masks=True, count=2, number=1, seed=0) -> dict:
    """An image with `count` rectangles; without boxes or masks where not asked for."""
    height, width = size
    generator = torch.Generator().manual_seed(seed + number)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    found = {"image": image, "height": 2 * height, "width": 2 * width, "image_id": number}
    if boxes or masks:
        corners = torch.tensor([[4, 6, 30, 40], [20, 8, 60, 44]])[:count]
        instances = Instances(size)
        instances.gt_classes = torch.tensor([2, 0])[:count]
        if boxes:
            instances.gt_boxes = Boxes(corners.float())
        if masks:
            instances.gt_masks = BitMasks(rectangles(corners, size))
        found["instances"] = instances
    return found


def losses_of(model: ViSFT, images: list[dict], seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return model(images)
