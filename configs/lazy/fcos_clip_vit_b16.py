"""FCOS on a CLIP ViT-B/16. detectron2 has no yacs config for FCOS, so this one is for LazyConfig only."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling import SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from visft.modeling.backbone import CLIPViT

model = get_config("common/models/fcos.py").model
model.backbone = L(SimpleFeaturePyramid)(
    net=L(CLIPViT.from_open_clip)(
        name="ViT-B-16",
        pretrained="laion2b_s34b_b88k",
        patch_size=16,
        train="full",
        window_size=14,
        global_blocks=(2, 5, 8, 11),
        activation_checkpointing=True,
    ),
    in_feature="last_feat",
    out_channels=256,
    scale_factors=(2.0, 1.0, 0.5),  # p3, p4, p5
    top_block=L(LastLevelMaxPool)(),  # p6
    norm="LN",
    square_pad=0,
)
model.head_in_features = ["p3", "p4", "p5", "p6"]
model.head.input_shape = [ShapeSpec(channels=256)] * 4
model.pixel_mean = [122.7709383, 116.7460125, 104.09373615]  # CLIP's x 255, RGB
model.pixel_std = [68.5005327, 66.6321579, 70.32316305]

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"

lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = get_config("common/optim.py").AdamW
train = get_config("common/train.py").train
train.max_iter = 90000
# The tower's weights come from open_clip.
train.init_checkpoint = ""
