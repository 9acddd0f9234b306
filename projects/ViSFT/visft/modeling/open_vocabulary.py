"""Masks and boxes of the detection and segmentation heads, named by the text encoder among any names.

    score = objectness^a * probability^b

of a proposal and a name. F-VLM (arXiv 2209.15639) and FC-CLIP (arXiv 2308.02487) weigh the scores that a detector and
a CLIP give a class in the same way. Here the detector's part is the objectness, which depends on no class, so one pair
of exponents serves all names. The text alone is also sure of parts and background, and objectness alone cannot name.

The defaults, 1 and 0.8, are FC-CLIP's for classes not trained on (beta is 0.8 in its published configs). F-VLM's 0.35
and 0.65 are for region proposals, most of which contain an object; most queries contain none.
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor, nn

from visft.classes.open_names import TEST, OpenNames, names_of, read_names
from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.class_embeddings import PROMPTS
from visft.modeling.heads.base import HeadInputs
from visft.modeling.heads.common.classification import best_pairs
from visft.modeling.heads.common.full_precision import without_autocast
from visft.modeling.heads.region_text_head import RegionText, RegionTextHead

KEY = "MODEL.VISFT.OPEN_VOCABULARY"

DUPLICATE_IOU = 0.5
"""Of two detections of one name that overlap by more, the less sure one is dropped. On the demo's unseen scenes AP50 of
boxes is 22.9 with 0.5 and 21.9 with 0.7, of masks 29.0 and 28.9."""

_PIXELS = 1 << 18
"""Of masks, compared at a time: a hundred float masks of a large image take gigabytes."""


class OpenVocabulary(nn.Module):
    """Names what heads propose. It has no weights, and nothing in the state.

    Attributes:
        names: what is looked for; `pred_classes` index `names.shown`.
    """

    def __init__(
        self,
        names: OpenNames,
        *,
        objectness_power: float = 1.0,
        text_power: float = 0.8,
        logit_scale: float = 0.0,
        others: Sequence[str] = ("background",),
        max_detections: int = 100,
        prompts: Sequence[str] = PROMPTS,
        loss: str = "auto",
    ) -> None:
        """
        Args:
            names: what to look for.
            objectness_power, text_power: the exponents a and b of the score.
            logit_scale: what cosines are multiplied by; 0: the base's.
            others: names that compete with the given ones and are not reported. Without any, a single name would have
                the probability 1 everywhere.
            max_detections: of an image, before duplicates are dropped.
            prompts, loss: as RegionTextHead has them.

        Raises:
            ConfigError: a number is below 0, or an argument of RegionTextHead is out of range.
        """
        super().__init__()
        if objectness_power < 0 or text_power < 0:
            raise ConfigError(
                f"{KEY}.OBJECTNESS_POWER is {objectness_power} and TEXT_POWER {text_power}; expected 0 or more"
            )
        self.objectness_power, self.text_power = objectness_power, text_power
        self.others, self.max_detections = tuple(others), max_detections
        self.options = {"prompts": tuple(prompts), "loss": loss, "logit_scale": logit_scale}
        self.names = names
        self.text = self._head()

    def bind(self, backbone: Backbone) -> None:
        """Take projection and text encoder of the tower; computes the names' embeddings.

        Raises:
            ConfigError: the tower has no text encoder.
        """
        if not isinstance(backbone, CLIPViT) or backbone.base is None:
            raise ConfigError(
                f"{KEY}.NAMES is set, and this tower has no text encoder to read the names: build it by its name in "
                "open_clip (MODEL.CLIP_VIT.NAME, CLIPViT.from_open_clip), or leave NAMES empty"
            )
        self.text.bind(backbone)

    def set_names(self, names: OpenNames) -> None:
        """Look for other names from now on."""
        if names != self.names:
            backbone, device = self.text.backbone, self.text.embeddings.device
            self.names = names
            self.text = self._head().to(device)
            self.text.bind(backbone)

    def inference(self, head: nn.Module, inputs: HeadInputs) -> list[Instances]:
        """A head's proposals with names: the best pairs of a proposal and a name, without duplicates.

        Args:
            head: with a method `proposals`.
            inputs: what the head reads.

        Returns:
            For each image the proposals' fields, `scores`, `pred_classes`, and `proposals`: the proposal's index (one
            may get several names).
        """
        pairs = zip(head.proposals(inputs), self.text.inference(inputs), strict=True)
        return [self._name(found, region) for found, region in pairs]

    def _head(self) -> RegionTextHead:
        others = tuple((name,) for name in self.others)
        return RegionTextHead(names=(*self.names.synonyms, *others), **self.options)

    def _name(self, found: Instances, region: RegionText) -> Instances:
        places = found.pred_masks if found.has("pred_masks") else found.pred_boxes
        if not len(found):
            found.scores = found.objectness
            found.pred_classes = found.proposals = torch.zeros_like(found.objectness, dtype=torch.int64)
            return found
        scores = self.scores(found.objectness, self.text.probabilities(region.logits(places)))
        best, proposals, classes = (part[0] for part in best_pairs(scores[None], self.max_detections))
        kept = distinct(best, classes, overlaps(found)[proposals][:, proposals])
        result = found[proposals[kept]]
        result.scores, result.proposals = best[kept], proposals[kept]
        result.pred_classes = self._classes.to(classes.device)[classes[kept]]
        return result

    def scores(self, objectness: Tensor, probabilities: Tensor) -> Tensor:
        """`[Q, names]`: see the module's formula. Names that read alike are one, `others` are left out.

        Args:
            objectness: `[Q]`.
            probabilities: `[Q, K]` of the text encoder's names.
        """
        reported = probabilities[:, self.text.rows[self._classes.to(self.text.rows.device)]]
        return objectness[:, None] ** self.objectness_power * reported**self.text_power

    @property
    def _classes(self) -> Tensor:
        """The first class of each name: others that read alike never occur."""
        first: dict[int, int] = {}
        for index, row in enumerate(self.text.rows[: len(self.names.shown)].tolist()):
            first.setdefault(row, index)
        return torch.tensor(list(first.values()))


def overlaps(found: Instances) -> Tensor:
    """Intersection over union of all pairs `[Q, Q]`, of masks where there are some, else of boxes."""
    if not found.has("pred_masks"):
        return pairwise_iou(found.pred_boxes, found.pred_boxes)
    return _mask_overlaps(found.pred_masks.flatten(1))


@without_autocast
def _mask_overlaps(masks: Tensor) -> Tensor:
    """Intersection over union of all pairs `[Q, Q]` of masks `[Q, pixels]`."""
    shared = sum(part.float() @ part.float().T for part in masks.split(_PIXELS, dim=1))
    area = shared.diagonal()
    return shared / (area[:, None] + area[None] - shared).clamp(min=1)


def distinct(scores: Tensor, classes: Tensor, overlap: Tensor) -> Tensor:
    """Indices of detections, the best first, without those that repeat a better one of their class.

    Args:
        scores, classes: `[N]`.
        overlap: `[N, N]`.
    """
    order = scores.argsort(descending=True, stable=True)
    repeats = ((overlap > DUPLICATE_IOU) & (classes[:, None] == classes[None]))[order][:, order].cpu()
    kept: list[int] = []
    for index in range(len(order)):
        if not repeats[index, kept].any():
            kept.append(index)
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def best_of_each(found: Instances) -> Instances:
    """Each proposal under its best name alone, for drawing."""
    seen: set[int] = set()
    rows = []
    for row in found.scores.argsort(descending=True, stable=True).tolist():
        if (proposal := int(found.proposals[row])) not in seen:
            seen.add(proposal)
            rows.append(row)
    return found[torch.tensor(rows, dtype=torch.int64)]


def build_open_vocabulary(cfg: CfgNode, heads: Mapping[str, nn.Module]) -> OpenVocabulary | None:
    """By MODEL.VISFT.OPEN_VOCABULARY; None: it is off.

    Raises:
        ConfigError: there are no names, no head proposes anything, or a value is out of range.
    """
    node, text = cfg.MODEL.VISFT.OPEN_VOCABULARY, cfg.MODEL.VISFT.REGION_TEXT
    if not node.NAMES:
        return None
    if not any(hasattr(head, "proposals") for head in heads.values()):
        raise ConfigError(
            f"{KEY}.NAMES is set, and of MODEL.VISFT.HEADS ({', '.join(heads) or 'none'}) none proposes boxes or masks "
            "to name: add a DETRHead or a Mask2FormerHead, or leave NAMES empty"
        )
    return OpenVocabulary(
        configured_names(cfg),
        objectness_power=node.OBJECTNESS_POWER,
        text_power=node.TEXT_POWER,
        logit_scale=node.LOGIT_SCALE,
        others=node.OTHERS,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        prompts=text.PROMPTS,
        loss=text.LOSS,
    )


def configured_names(cfg: CfgNode, data_set: str = "") -> OpenNames:
    """The names of a config.

    Args:
        data_set: whose classes `test` stands for; left out: the first of DATASETS.TEST.

    Raises:
        ConfigError: there are none.
    """
    names = tuple(cfg.MODEL.VISFT.OPEN_VOCABULARY.NAMES)
    if names != (TEST,):
        return read_names(f"{KEY}.NAMES", names)
    if not data_set and not cfg.DATASETS.TEST:
        raise ConfigError(f"{KEY}.NAMES is `test`, and DATASETS.TEST is empty: name a data set there")
    return names_of(data_set or cfg.DATASETS.TEST[0])
