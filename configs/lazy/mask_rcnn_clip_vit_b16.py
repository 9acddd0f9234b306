"""Mask R-CNN on a CLIP ViT-B/16 for detectron2's LazyConfig, built from explicit constructors.

Train it with detectron2's `tools/lazyconfig_train_net.py`, after `import visft`.
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from visft.modeling.backbone import CLIPViT

model = get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net = L(CLIPViT.from_open_clip)(
    name="ViT-B-16",
    pretrained="laion2b_s34b_b88k",
    patch_size=16,
    train="full",
    window_size=14,
    global_blocks=(2, 5, 8, 11),
    activation_checkpointing=True,
)
model.backbone.in_feature = "last_feat"
model.backbone.square_pad = 0  # any size and aspect
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
