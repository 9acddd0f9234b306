"""Which of the data set's classes are in a picture: a head for tags."""

import torch

from visft.modeling.heads import VISFT_HEADS_REGISTRY, VisftHead, label_space


@VISFT_HEADS_REGISTRY.register()
class TagHead(VisftHead):
    def __init__(self, cfg, name, input_shape):
        super().__init__()
        self.linear = torch.nn.Linear(input_shape.channels, label_space(cfg, name).num_classes)

    def has_labels(self, image):
        return "instances" in image and image["instances"].has("gt_classes")

    def normalizers(self, images):
        return torch.tensor([float(len(images))])

    def losses(self, features, padding_mask, images, image_sizes, padded_size, normalizers):
        logits = self.linear(features.mean((2, 3)))
        target = torch.zeros_like(logits)
        for row, image in zip(target, images, strict=True):
            row[image["instances"].gt_classes] = 1
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return {"loss_tags": loss / normalizers[0]}

    def inference(self, features, padding_mask, images, image_sizes, padded_size):
        return [str(row.nonzero().flatten().tolist()) for row in self.linear(features.mean((2, 3))) > 0]
