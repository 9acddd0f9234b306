"""A small model with three heads, and batches with every mix of labels, one for each process."""

import torch
from annotated_images import rectangles
from detectron2.structures import BitMasks, Boxes, Instances
from query_heads import detr, mask2former
from torch import nn

from visft.modeling.backbone import CLIPViT, lora
from visft.modeling.heads import LabelSpace, RegionTextHead
from visft.modeling.meta_arch import ViSFT

SIZE = (48, 64)

# The labels of each process's two images: how many objects, and whether with boxes and masks. None: no labels.
BOTH, BOXES, MASKS = ("boxes", "masks"), ("boxes",), ("masks",)
BATCHES = {
    "all labels": [[(2, BOTH), (3, BOTH)], [(1, BOTH), (0, BOTH)]],
    "no masks on one": [[(2, BOTH), (3, BOTH)], [(2, BOXES), (1, BOXES)]],
    "heads apart": [[(2, BOXES), (1, BOXES)], [(3, MASKS), (1, MASKS)]],
    "no labels on one": [[(2, BOTH), (3, BOTH)], [None, None]],
    "no labels on the first": [[None, None], [(2, BOTH), None]],
    "one object in all": [[(1, BOTH), (0, BOTH)], [(0, BOTH), (0, BOTH)]],
    "no objects": [[(0, BOTH)], [(0, BOTH), (0, BOTH)]],
    "no masks anywhere": [[(2, BOXES)], [(1, BOXES), (2, BOXES)]],
    "no labels anywhere": [[None], [None]],
    # The task that TASK_MIXING `ratio` has drawn.
    "task segmentation": [[(2, BOTH), (3, BOTH)], [(1, BOTH), (0, BOTH)]],
    "task detection": [[(2, BOTH)], [(1, BOTH)]],
}


def picture(spec: tuple[int, tuple[str, ...]] | None, number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator)
    found = {"image": image, "image_id": number, "height": SIZE[0], "width": SIZE[1]}
    if spec is not None:
        count, kinds = spec
        low = torch.rand(count, 2, generator=generator) * torch.tensor([30.0, 20.0])
        boxes = torch.cat((low, low + 10 + torch.rand(count, 2, generator=generator) * 15), dim=1)
        instances = Instances(SIZE)
        instances.gt_classes = torch.randint(0, 4, (count,), generator=generator)
        if "boxes" in kinds:
            instances.gt_boxes = Boxes(boxes)
        if "masks" in kinds:
            instances.gt_masks = BitMasks(rectangles(boxes.round(), SIZE))
        if count or len(kinds) > 1:
            found["instances"] = instances
    return found


def batches(name: str) -> list[list[dict]]:
    """The batch of each process."""
    specs = BATCHES[name]
    task = {"task": name.removeprefix("task ")} if name.startswith("task ") else {}
    return [[picture(s, 10 * rank + i) | task for i, s in enumerate(part)] for rank, part in enumerate(specs)]


class NamedHead(RegionTextHead):
    """With embeddings of its names that need no text encoder."""

    def bind(self, backbone: CLIPViT) -> None:
        self.embeddings = nn.functional.normalize(torch.randn(4, 16), dim=-1)
        self.rows, self.sigmoid, self._backbone = torch.arange(4), False, (backbone,)


def build(stage: str) -> ViSFT:
    """A small model with the same weights in every process, LoRA away from zero, no dropout.

    Stage `lora balanced` is `lora` with balanced gradients.
    """
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(11)
    tower = VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16
    )
    backbone = CLIPViT(tower)
    lora.inject(backbone, rank=2, alpha=2.0)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    sizes = {"in_channels": 32, "num_queries": 5, "num_attention_heads": 2, "feedforward_dim": 16}
    detector = detr(LabelSpace(4), encoder_dim=16, decoder_dim=16, **sizes)
    segmenter = mask2former(LabelSpace(4), encoder_feedforward_dim=16, num_points=40, **sizes)
    named = NamedHead(names=[("a",), ("b",), ("c",), ("d",)], logit_scale=5.0)
    heads = {"detection": detector, "segmentation": segmenter, "region_text": named}
    return ViSFT(
        backbone=backbone,
        heads=heads,
        loss_weights=(1.0, 0.5, 2.0),
        balance_gradients=stage.endswith("balanced"),
        stage=stage.split()[0],
    ).train()
