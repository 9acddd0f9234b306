"""Which of the data set's classes are in an image: a head for tags."""

import torch

from visft.modeling.heads import VISFT_HEADS_REGISTRY, VisftHead, label_space


@VISFT_HEADS_REGISTRY.register()
class TagHead(VisftHead):
    label_fields = ("gt_classes",)

    def __init__(self, cfg, name, input_shape):
        super().__init__()
        self.linear = torch.nn.Linear(input_shape.channels, label_space(cfg, name).num_classes)

    def normalizers(self, images):
        return torch.tensor([float(len(images))])

    def losses(self, inputs, normalizers):
        logits = self.linear(inputs.features.mean((2, 3)))
        target = torch.zeros_like(logits)
        for row, image in zip(target, inputs.images, strict=True):
            row[image["instances"].gt_classes] = 1
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return {"loss_tags": loss / normalizers[0]}

    def inference(self, inputs):
        return [
            str(row.nonzero().flatten().tolist()) for row in self.linear(inputs.features.mean((2, 3))) > 0
        ]
