"""Any two-stage detector of detectron2 as a head: a proposal generator and ROI heads over the single map."""

import contextlib
import math
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator, build_roi_heads
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage, has_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from visft.errors import ConfigError
from visft.modeling.heads.base import HeadInputs, VisftHead, num_targets
from visft.modeling.heads.build import VISFT_HEADS_REGISTRY
from visft.modeling.heads.common.label_space import LabelSpace, label_space

FEATURE = "map"
"""What the detector's parts call the map; `IN_FEATURES` of a config is not read."""


@VISFT_HEADS_REGISTRY.register()
class RCNNHead(VisftHead):
    """Faster, Mask or Cascade R-CNN on the tower's map, made of detectron2's own parts and keys.

    `MODEL.PROPOSAL_GENERATOR`, `RPN`, `ANCHOR_GENERATOR` (one level), `ROI_HEADS` and `ROI_*_HEAD` choose them, as for
    `GeneralizedRCNN`; `MASK_ON` and `KEYPOINT_ON` add their branches. The number of classes is the head's own. For LVIS
    there are `ROI_BOX_HEAD.USE_SIGMOID_CE` and `USE_FED_LOSS`.
    """

    @configurable
    def __init__(
        self,
        *,
        proposal_generator: nn.Module | None,
        roi_heads: nn.Module,
        stride: int,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            proposal_generator: reads the map under the name `FEATURE`; None: proposals come with the images.
            roi_heads: likewise.
            stride: of the tower's map, in pixels. The parts are built for `detector_stride(stride)`.
            loss_weight: a factor on all losses.
        """
        super().__init__()
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.scale = stride / detector_stride(stride)
        self.loss_weight = loss_weight
        self.labels = LabelSpace(roi_heads.num_classes)
        branches = [kind for kind in ("mask", "keypoint") if getattr(roi_heads, f"{kind}_on", False)]
        self.label_fields = ("gt_boxes", *(f"gt_{branch}s" for branch in branches))
        # Whatever counts classes: of boxes (one a stage in a cascade), and of masks.
        classes = [
            name
            for name, module in roi_heads.named_modules()
            if isinstance(module, FastRCNNOutputLayers) or name == "mask_head.predictor"
        ]
        self.class_layers = tuple(f"roi_heads.{name}" for name in classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict:
        """
        Raises:
            ConfigError: raw data set ids as labels; parts that do not fit one map of the tower's width.
        """
        key = f"MODEL.VISFT.{name.upper()}"
        if cfg.MODEL.VISFT[name.upper()].LABEL_SPACE != "contiguous":
            raise ConfigError(
                f"{key}.LABEL_SPACE is `dataset_id`, which RCNNHead has not: set it to `contiguous`"
            )
        stride, channels = detector_stride(input_shape.stride), input_shape.channels
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = [FEATURE]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = label_space(cfg, name).num_classes
        if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and channels != 4 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS:
            raise ConfigError(
                f"MODEL.ROI_HEADS.NAME is `Res5ROIHeads`, whose ResNet stage does not read the tower's {channels} "
                "channels: set it to StandardROIHeads (and MODEL.ROI_BOX_HEAD.NAME to FastRCNNConvFCHead)"
            )
        shape = {FEATURE: ShapeSpec(channels=channels, stride=stride)}
        try:
            return {
                "proposal_generator": build_proposal_generator(cfg, shape),
                "roi_heads": build_roi_heads(cfg, shape),
                "stride": input_shape.stride,
            }
        # detectron2's registries, its checks of arguments, and of metadata that USE_FED_LOSS reads.
        except (KeyError, AssertionError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"{key}.HEAD is `RCNNHead`, and detectron2 cannot build it ({' '.join(map(str, error.args))}): "
                "correct MODEL.PROPOSAL_GENERATOR, ANCHOR_GENERATOR (one level), ROI_HEADS or ROI_BOX_HEAD"
            ) from error

    @classmethod
    def needs_masks(cls, cfg: CfgNode) -> bool:
        return cfg.MODEL.MASK_ON

    def normalizers(self, images: list[dict]) -> Tensor:
        """[1]: number of images. detectron2 divides by numbers of samples, which are as many for each image."""
        self.labels.check(images)
        return torch.tensor([float(len(images))])

    def losses(self, inputs: HeadInputs, normalizers: Tensor) -> dict[str, Tensor]:
        """The losses of the parts, under detectron2's names (`loss_rpn_cls`, `loss_cls`, ...)."""
        images = inputs.images
        maps, batch = self._maps(inputs)
        targets = [_targets(image, inputs.features.device) for image in images]
        # The parts report to an EventStorage, which only a trainer provides.
        storage = contextlib.nullcontext() if has_event_storage() else EventStorage()
        with storage, _computing_losses(self):
            proposals, losses = self._proposals(maps, batch, images, targets)
            _, roi_losses = self.roi_heads(batch, maps, proposals, targets)
        factor = self.loss_weight * len(images) / float(normalizers[0])
        return {name: factor * loss for name, loss in {**losses, **roi_losses}.items()}

    def inference(self, inputs: HeadInputs) -> list[Instances]:
        """Detections in the original images, with `pred_masks` if `MASK_ON` is set."""
        maps, batch = self._maps(inputs)
        proposals, _ = self._proposals(maps, batch, inputs.images, None)
        results, _ = self.roi_heads(batch, maps, proposals, None)
        sizes = inputs.original_sizes
        return [detector_postprocess(result, *size) for result, size in zip(results, sizes, strict=True)]

    def _maps(self, inputs: HeadInputs) -> tuple[dict[str, Tensor], ImageList]:
        """What detectron2's parts take: named maps, and the images, of which they read the sizes alone."""
        features = inputs.features.float()
        if self.scale != 1:
            # By the factor, not to a size: cell centres stay where they are in the image.
            features = F.interpolate(
                features, scale_factor=self.scale, mode="bilinear", recompute_scale_factor=False
            )
        pixels = features.new_zeros(()).expand(len(features), 3, *inputs.padded_size)
        return {FEATURE: features}, ImageList(pixels, inputs.image_sizes)

    def _proposals(
        self, maps: dict[str, Tensor], batch: ImageList, images: list[dict], targets: list[Instances] | None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        if self.proposal_generator is None:
            return [image["proposals"].to(batch.device) for image in images], {}
        return self.proposal_generator(batch, maps, targets)


def detector_stride(stride: int) -> int:
    """The power of two nearest to a map's stride: detectron2's ROI pooling takes no others (14 -> 16)."""
    return 2 ** round(math.log2(stride))


def _targets(image: dict, device: torch.device) -> Instances:
    """Labels on the device; masks given as a tensor [T, H, W] become BitMasks."""
    instances = image["instances"]
    targets = Instances(instances.image_size, **instances.get_fields())
    if not num_targets(image):
        targets.gt_boxes, targets.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
    if targets.has("gt_masks") and not isinstance(targets.gt_masks, (BitMasks, PolygonMasks)):
        targets.gt_masks = BitMasks(targets.gt_masks)
    return targets.to(device)


@contextlib.contextmanager
def _computing_losses(head: nn.Module) -> Iterator[None]:
    """A context in which detectron2's parts compute losses although the head is frozen, in evaluation mode.

    They compute losses in training mode only. Dropout and batch statistics stay as they are.
    """
    behaves = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    changed = [m for m in head.modules() if not m.training and not isinstance(m, behaves)]
    for module in changed:
        module.training = True
    try:
        yield
    finally:
        for module in changed:
            module.training = False
