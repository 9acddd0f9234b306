"""The frozen text encoder as a head: a region's mean feature learns to be near the text that names it.

A CLIP compares the embedding of a whole image with texts. Its last norm, pooler and projection can be applied to the
mean feature of a region as well (as MaskCLIP does to patches, arXiv 2112.01071), but the result of a pretrained tower
has little to do with the text that names the region. As a frozen head, this comparison trains the tower to make it so.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes
from torch import Tensor
from torch.nn import functional as F

from visft.classes.class_names import synonyms
from visft.errors import ConfigError, check_one_of
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.class_embeddings import PROMPTS, ClassText, check_prompts, class_text
from visft.modeling.backbone.text_encoder import TextTower
from visft.modeling.heads.base import HeadInputs, VisftHead, bit_masks, nonzero_count, num_targets
from visft.modeling.heads.build import VISFT_HEADS_REGISTRY
from visft.modeling.heads.common import region_pooling
from visft.modeling.heads.common.federated import Federated, build_federated
from visft.modeling.heads.common.full_precision import without_autocast
from visft.modeling.heads.common.label_space import LabelSpace, train_metadata

REGIONS = ("masks", "boxes")
LOSSES = ("auto", "softmax", "sigmoid")


@VISFT_HEADS_REGISTRY.register()
class RegionTextHead(VisftHead):
    """Classifies annotated regions by the text embeddings of their class names. It has no weights of its own.

    A region is its mask where it has one, else its box. Its mean feature goes through the tower's own last norm, pooler
    or projection, to unit length, and is compared with the names' embeddings. Everything is float32 under any autocast.
    """

    label_fields = ("gt_boxes",)

    @configurable
    def __init__(
        self,
        *,
        names: Sequence[Sequence[str]],
        prompts: Sequence[str] = PROMPTS,
        regions: str = "masks",
        loss: str = "auto",
        logit_scale: float = 0.0,
        weight: float = 1.0,
        federated: Federated | None = None,
    ):
        """
        Args:
            names: what each class is called: one or more names.
            prompts: each with one `{}`, the place of a name.
            regions: `masks` (boxes where there are none) or `boxes`.
            loss: `softmax` over the names (CLIP's), `sigmoid` for each (SigLIP's), `auto`: as the base was trained.
            logit_scale: what cosines are multiplied by; 0: the base's.
            weight: of the loss.
            federated: which classes take part in an iteration; None: all.

        Raises:
            ConfigError: there are no names, or an argument is out of range.
        """
        super().__init__()
        check_one_of("REGIONS", regions, REGIONS)
        check_one_of("LOSS", loss, LOSSES)
        if logit_scale < 0 or weight < 0:
            raise ConfigError(f"LOGIT_SCALE is {logit_scale} and WEIGHT {weight}; expected 0 or more")
        if not names or not all(names):
            raise ConfigError("the classes have no names, by which this head knows them")
        check_prompts("PROMPTS", prompts)
        self.class_names = tuple(tuple(row) for row in names)
        self.prompts, self.regions, self.kind = tuple(prompts), regions, loss
        self.logit_scale, self.logit_bias, self.weight = logit_scale, 0.0, weight
        self.labels = LabelSpace(len(names))
        self.federated = federated
        self.names: tuple[str, ...] = ()
        self.register_buffer("embeddings", torch.zeros(0, 0), persistent=False)
        self.register_buffer("rows", torch.zeros(0, dtype=torch.int64), persistent=False)
        self._backbone: tuple[CLIPViT, ...] = ()  # in a tuple, as it is no part of this module

    @classmethod
    def from_config(cls, cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict:
        node, key = cfg.MODEL.VISFT[name.upper()], f"MODEL.VISFT.{name.upper()}"
        metadata = train_metadata(cfg, "thing_classes", f"which {key} compares regions with")
        names = synonyms(metadata)
        return {
            "names": names,
            "prompts": node.PROMPTS,
            "regions": node.REGIONS,
            "loss": node.LOSS,
            "logit_scale": node.LOGIT_SCALE,
            "weight": node.WEIGHT,
            "federated": build_federated(cfg, name, LabelSpace(len(names))),
        }

    def bind(self, backbone: Backbone) -> None:
        """Take projection and text encoder of the tower; computes the names' embeddings.

        Raises:
            ConfigError: the tower has no text encoder.
        """
        if not isinstance(backbone, CLIPViT) or backbone.base is None:
            raise ConfigError(
                "MODEL.VISFT.HEADS has a RegionTextHead, which needs the text encoder of the tower's CLIP, and this "
                "tower has none: build it by its name in open_clip (MODEL.CLIP_VIT.NAME, CLIPViT.from_open_clip), or "
                "leave the head out"
            )
        text = TextTower(backbone)
        found = class_text(text, self.class_names, self.prompts)
        device = self.embeddings.device
        self.embeddings, self.rows = found.embeddings.to(device), found.rows.to(device)
        self.names = found.names
        self._backbone = (backbone,)
        self.sigmoid = self.kind == "sigmoid" or (self.kind == "auto" and text.logit_bias is not None)
        self.logit_scale = self.logit_scale or text.logit_scale
        self.logit_bias = (text.logit_bias or 0.0) if self.sigmoid else 0.0

    @property
    def backbone(self) -> CLIPViT:
        """The tower whose projection is used.

        Raises:
            ConfigError: `bind` was not called.
        """
        if not self._backbone:
            raise ConfigError("this RegionTextHead knows no tower yet: call bind(backbone) first")
        return self._backbone[0]

    @property
    def reads_masks(self) -> bool:
        return self.regions != "boxes"

    def has_labels(self, image: dict) -> bool:
        return super().has_labels(image) and num_targets(image) > 0

    def normalizers(self, images: list[dict]) -> Tensor:
        """[1]: number of regions. With a federated loss [1 + classes + 1]: then whether each class is there."""
        self.labels.check(images)
        count = torch.tensor([float(sum(num_targets(image) for image in images))])
        if self.federated is None:
            return count
        return torch.cat((count, self.federated.present(images, self.labels)))

    def losses(self, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
        features, images = inputs.features, inputs.images
        chosen = None if self.federated is None else self.federated.draw(normalizers[1:])[:-1]
        device, means = features.device, []
        for map_, image in zip(features, images, strict=True):
            coverage = self._coverage(image, inputs.padded_size, tuple(features.shape[-2:]))
            means.append(region_pooling.pool(map_, coverage.to(device)))
        logits = self.logits(self.backbone.patch_embeddings(torch.cat(means)))
        classes = torch.cat([image["instances"].gt_classes for image in images]).to(device)
        if chosen is not None:
            logits = Federated.leave_out(logits, self._rows_of(chosen))
        loss = self._loss(logits, self.rows[classes])
        return {"loss_text": self.weight * loss / nonzero_count(normalizers[0].to(device))}

    def inference(self, inputs: HeadInputs) -> "list[RegionText]":
        sizes = zip(inputs.image_sizes, inputs.original_sizes, strict=True)
        return [
            RegionText(self, map_, size, inputs.padded_size, original)
            for map_, (size, original) in zip(inputs.features, sizes, strict=True)
        ]

    def class_text(self, names: Sequence[Sequence[str]], prompts: Sequence[str] | None = None) -> ClassText:
        """Classifiers of any other names, by the same text encoder.

        Args:
            names: what each class is called: one or more names.
            prompts: the head's own if left out.
        """
        return class_text(TextTower(self.backbone), names, prompts or self.prompts)

    @without_autocast
    def logits(self, found: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Scaled cosines `[R, K]` of regions with names.

        Args:
            found: `[R, D]`, of unit length.
            embeddings: `[K, D]`, of unit length; the training classes' if left out.
        """
        embeddings = self.embeddings if embeddings is None else embeddings.to(found.device)
        return self.logit_scale * found @ embeddings.T + self.logit_bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each name `[R, K]`: they sum to 1 over names for a CLIP, each is on its own for a SigLIP."""
        return logits.sigmoid() if self.sigmoid else logits.softmax(-1)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Summed over regions; of the sigmoid also over names (SigLIP, arXiv 2303.15343, section 3.2)."""
        if not self.sigmoid:
            return F.cross_entropy(logits, target, reduction="sum")
        sign = 2 * F.one_hot(target, logits.shape[1]).to(logits) - 1
        return -F.logsigmoid(sign * logits).sum()

    def _rows_of(self, chosen: Tensor) -> Tensor:
        """[K] bool: the rows of chosen classes [number of classes] bool."""
        found = torch.zeros(len(self.embeddings), dtype=torch.bool, device=self.rows.device)
        found[self.rows[chosen.to(self.rows.device)]] = True
        return found

    def _coverage(self, image: dict, padded_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """The share of each cell that the annotated regions of an image cover `[R, h, w]`."""
        instances, masks = image["instances"], None
        if self.regions == "masks" and instances.has("gt_masks"):
            masks = bit_masks(instances.gt_masks, instances.image_size)
        return region_pooling.region_coverage(instances.gt_boxes.tensor, masks, padded_size, grid)


class RegionText:
    """The head's view of one image, which can name any regions of it.

    Attributes:
        features: `[C, h, w]`.
        image_size, padded_size, size: (height, width) of the image as the tower saw it, of what the map covers, and of
            the original image, in whose coordinates regions are given.
    """

    def __init__(
        self,
        head: RegionTextHead,
        features: Tensor,
        image_size: tuple[int, int],
        padded_size: tuple[int, int],
        size: tuple[int, int],
    ) -> None:
        self.head, self.features = head, features
        self.image_size, self.padded_size, self.size = tuple(image_size), tuple(padded_size), tuple(size)

    def embeddings(self, regions: Tensor | Boxes) -> Tensor:
        """Regions in the space of texts `[R, D]`, of unit length.

        Args:
            regions: masks `[R, H, W]` bool of the original image's size, or boxes `[R, 4]` in its pixels.
        """
        boxes, masks = regions.tensor if isinstance(regions, Boxes) else regions, None
        if boxes.ndim == 3:
            parts = [part for part in regions.split(32) if len(part)]
            masks = [F.interpolate(part[None].float(), self.image_size, mode="area")[0] for part in parts]
            masks = torch.cat(masks) if masks else torch.zeros(0, *self.image_size)
            boxes = BitMasks(regions.cpu()).get_bounding_boxes().tensor
        scale = [seen / own for seen, own in zip(self.image_size[::-1], self.size[::-1], strict=True)]
        boxes, grid = boxes * boxes.new_tensor(scale).repeat(2), tuple(self.features.shape[-2:])
        coverage = region_pooling.region_coverage(boxes, masks, self.padded_size, grid)
        means = region_pooling.pool(self.features, coverage.to(self.features.device))
        return self.head.backbone.patch_embeddings(means)

    def logits(self, regions: Tensor | Boxes, embeddings: Tensor | None = None) -> Tensor:
        """Scaled cosines `[R, K]` with names: the training classes' rows, or those of `embeddings` `[K, D]`."""
        return self.head.logits(self.embeddings(regions), embeddings)
