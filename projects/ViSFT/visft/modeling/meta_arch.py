"""The meta-architecture of ViSFT: one pass through the tower feeds every head that has labels."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode, configurable
from detectron2.config.defaults import _C as DETECTRON2_DEFAULTS
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from visft.checkpoint.load import load_heads
from visft.checkpoint.run_folder import STAGES
from visft.classes.dataset_classes import Classes
from visft.errors import ConfigError, check_one_of
from visft.modeling import distributed
from visft.modeling.backbone.sharding import is_sharded
from visft.modeling.gradient_balance import balanced_copies
from visft.modeling.heads import Caption, HeadInputs, build_head, head_names, rcnn_head  # noqa: F401  (registers RCNNHead)
from visft.modeling.heads.build import head_class, single_map
from visft.modeling.open_vocabulary import OpenVocabulary, build_open_vocabulary
from visft.modeling.tower_losses import Batch, ObjectiveGroup, build_objectives
from visft.utils import shared_random

TUNES = ("lora", "full")

UNLABELLED = "unlabelled"
"""Name of the loss, 0, of a batch without a label for any head: a trainer can still call `backward`."""


def check_config(cfg: CfgNode) -> None:
    """Check the keys that say what a `ViSFT` consists of. Nothing is built.

    Raises:
        ConfigError: names the first wrong key.
    """
    node, heads = cfg.MODEL.VISFT, tuple(cfg.MODEL.VISFT.HEADS)
    for name in heads:
        head_class(cfg, name)
    if len(set(heads)) != len(heads):
        raise ConfigError(f"MODEL.VISFT.HEADS names a head twice: {', '.join(heads)}; expected each once")
    if not heads and not node.OBJECTIVES:
        raise ConfigError(f"MODEL.VISFT.HEADS is empty; expected some of {', '.join(head_names(cfg))}")
    if not heads and tuple(cfg.VISFT.STAGES) != ("lora",):
        raise ConfigError(
            f"MODEL.VISFT.HEADS is empty and VISFT.STAGES is {tuple(cfg.VISFT.STAGES)}: without heads, only stage lora "
            "can run; set STAGES to ('lora',)"
        )
    _check_weights(node.LOSS_WEIGHTS, heads)
    check_one_of("MODEL.VISFT.TUNE", node.TUNE, TUNES)
    if cfg.INPUT.FORMAT != "RGB":
        raise ConfigError(
            f"INPUT.FORMAT is `{cfg.INPUT.FORMAT}`; ViSFT reads images as RGB, like CLIP: set it to RGB, with "
            "MODEL.PIXEL_MEAN and PIXEL_STD in this order"
        )


def _check_weights(loss_weights: Sequence[float], heads: Collection[str]) -> None:
    if loss_weights and len(loss_weights) != len(heads):
        raise ConfigError(
            f"MODEL.VISFT.LOSS_WEIGHTS has {len(loss_weights)} numbers for {len(heads)} heads; expected one number per "
            "head in MODEL.VISFT.HEADS, or ()"
        )


@META_ARCH_REGISTRY.register()
class ViSFT(nn.Module):
    """Several heads over one map of features.

    In training mode, `forward` returns `{"detection/loss_ce": ..., ...}`, weighted scalars to be summed; in evaluation
    mode a list of `{"instances": Instances, "detection": ..., "segmentation": ..., "captioning": str, "caption": str}`,
    one for each image.

    Attributes:
        backbone: the tower.
        heads: the heads by name; a ModuleDict.
        objectives: the losses on the tower itself, which act in stage `lora`; no module.
        stage: what trains. `heads`: the tower is frozen and no graph is built through it. `lora`: the tower trains (see
            `tune`); the heads are frozen (evaluation mode, so without dropout) unless `freeze_heads` is False.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        heads: Mapping[str, nn.Module],
        loss_weights: Sequence[float] = (),
        balance_gradients: bool = False,
        tune: str = "lora",
        freeze_heads: bool = True,
        objectives: ObjectiveGroup | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        stage: str = "heads",
        open_vocabulary: OpenVocabulary | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            backbone: maps normalised images `[N, 3, H, W]` to one map, as CLIPViT does.
            heads: `VisftHead`s by name.
            loss_weights: a factor on all losses of a head, in the order of `heads`; (): 1 for each.
            balance_gradients: in stage `lora`, bring the heads' gradients on the features to one norm, times their
                loss weights (see `balanced_copies`).
            tune: what trains in the tower in stage `lora`: its adapters (`lora`), or all its weights (`full`).
            freeze_heads: False: the heads train in stage `lora` too.
            objectives: losses on the tower without a head, in stage `lora`; made for this backbone before its tuning.
            pixel_mean, pixel_std: of R, G, B, in units of 0..255; None: the tower's own.
            stage: `heads` or `lora`.
            open_vocabulary: in inference, names what the heads propose; None: they use the classes they learnt.
            class_names: what these classes are called; (): not known.

        Raises:
            ConfigError: more or fewer loss weights than heads, several maps, an unknown stage or `tune`.
        """
        super().__init__()
        _check_weights(loss_weights, heads)
        check_one_of("MODEL.VISFT.TUNE", tune, TUNES)
        self.backbone = backbone
        self.feature, _ = single_map(backbone.output_shape())
        self.heads = nn.ModuleDict(heads)
        for head in self.heads.values():
            head.bind(backbone)
        self.open_vocabulary = open_vocabulary
        if open_vocabulary is not None:
            open_vocabulary.bind(backbone)
        self._class_names = tuple(class_names)
        self.balance_gradients = balance_gradients
        self.tune, self.freeze_heads = tune, freeze_heads
        self.objectives = ObjectiveGroup({}) if objectives is None else objectives
        self.loss_weights = dict(zip(heads, loss_weights or [1.0] * len(heads), strict=True))
        for name, given in (("mean", pixel_mean), ("std", pixel_std)):
            value = self._pixel_values(name, given)
            self.register_buffer(f"pixel_{name}", value.view(3, 1, 1), persistent=False)
        self._fixed = {name for name, p in self.heads.named_parameters() if not p.requires_grad}
        self.set_stage(stage)

    @classmethod
    def from_config(cls, cfg: CfgNode, backbone: Backbone | None = None) -> dict:
        """Heads and objectives by `MODEL.VISFT`, weights of `HEAD_FILES` included; the first of `VISFT.STAGES`.

        Args:
            backbone: instead of the one that the config describes.

        Raises:
            ConfigError: a key is wrong (see `check_config`).
        """
        check_config(cfg)
        node, names = cfg.MODEL.VISFT, tuple(cfg.MODEL.VISFT.HEADS)
        backbone = build_backbone(cfg) if backbone is None else backbone
        heads = {name: build_head(cfg, name, backbone.output_shape()) for name in names}
        reinit = [name for name in names if node[name.upper()].get("REINIT_CLASSES", False)]
        load_heads(SimpleNamespace(heads=heads), node.HEAD_FILES, reinit)
        # detectron2's defaults are ImageNet's, for ResNets; left as they are, they stand for the tower's own.
        model, stock = cfg.MODEL, DETECTRON2_DEFAULTS.MODEL
        given = [*model.PIXEL_MEAN, *model.PIXEL_STD] != [*stock.PIXEL_MEAN, *stock.PIXEL_STD]
        return {
            "backbone": backbone,
            "heads": heads,
            "loss_weights": tuple(node.LOSS_WEIGHTS),
            "balance_gradients": node.BALANCE_GRADIENTS,
            "tune": node.TUNE,
            "freeze_heads": node.FREEZE_HEADS,
            "objectives": build_objectives(cfg, backbone),
            "pixel_mean": model.PIXEL_MEAN if given or not hasattr(backbone, "mean") else None,
            "pixel_std": model.PIXEL_STD if given or not hasattr(backbone, "std") else None,
            "stage": cfg.VISFT.STAGES[0] if cfg.VISFT.STAGES else STAGES[0],
            "open_vocabulary": build_open_vocabulary(cfg, heads),
            # After the heads, which load a data set whose classes they need.
            "class_names": Classes.known(cfg).names,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @property
    def class_names(self) -> tuple[str, ...]:
        """What `pred_classes` stand for: the open vocabulary's names, else the classes that the heads learnt."""
        return self._class_names if self.open_vocabulary is None else tuple(self.open_vocabulary.names.shown)

    @property
    def _heads_train(self) -> bool:
        return self.stage == "heads" or not self.freeze_heads

    def set_stage(self, stage: str) -> None:
        """Choose what trains: `heads` or `lora` (see the class).

        Raises:
            ConfigError: another name, or `lora` without LoRA in the tower where that is to train.
        """
        check_one_of("VISFT.STAGES", stage, STAGES)
        adapters = any("lora_" in name for name, _ in self.backbone.named_parameters())
        if stage == "lora" and self.tune == "lora" and not adapters:
            raise ConfigError(
                "stage `lora` needs LoRA in the tower, which has none; build the model with `lora` in VISFT.STAGES, "
                "call visft.modeling.backbone.lora.inject(backbone), or set MODEL.VISFT.TUNE full"
            )
        self.stage = stage
        for name, parameter in self.heads.named_parameters():
            parameter.requires_grad_(self._heads_train and name not in self._fixed)
        if hasattr(self.backbone, "set_train"):
            self.backbone.set_train(self.tune if stage == "lora" else "none")
        else:
            self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ViSFT":
        """Training mode for what the stage trains; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.stage == "heads":
            self.backbone.eval()
        if not self._heads_train:
            self.heads.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses in training mode, predictions in evaluation mode.

        Args:
            batched_inputs: for each image `image` (RGB, uint8 or float `[3, H, W]`, 0..255), in training what its
                heads need (`instances`), and optionally `height` and `width` of the original image (pixels), and
                `task`: the one head that learns from it.
        """
        return self.losses(batched_inputs) if self.training else self.inference(batched_inputs)

    def losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Weighted losses, `head/loss`, of every head that has labels in the batch, and of every tower loss.

        Images without labels for any of them are not computed. With several processes, a head divides by the mean of
        its counts over all of them, so that the mean of the gradients is that of one process with the joined batch.
        """
        extract = functools.cache(lambda rows: self.extract([batched_inputs[i] for i in rows]))
        # Its number is drawn first: heads with dropout leave the processes' generators in different states.
        batch = Batch(self.backbone, batched_inputs, extract, shared_random.peek(), self.device)
        labelled = {name: self._labelled(name, batched_inputs) for name in self.heads}
        losses = self._head_losses(batched_inputs, labelled, extract)
        if self.stage == "lora":
            losses |= self.objectives.losses(batch)
        # A leaf of its own: `backward` can be called and leads nowhere.
        losses = losses or {UNLABELLED: self.pixel_mean.new_zeros((), requires_grad=True)}
        idle = [self.heads[name] for name, rows in labelled.items() if not rows]
        if not (batch.ran or any(labelled.values())):
            idle.append(self.backbone)
        if idle:
            parameters = [parameter for module in idle for parameter in module.parameters()]
            distributed.add_zero(losses, distributed.zero_for(parameters, self.device))
        return losses

    def _labelled(self, name: str, batched_inputs: list[dict]) -> list[int]:
        """Indices of the images that a head learns from; none where nothing could learn from it."""
        head = self.heads[name]
        if not (head.trainable or self.stage == "lora"):
            return []
        return [i for i, x in enumerate(batched_inputs) if x.get("task", name) == name and head.has_labels(x)]

    def _head_losses(
        self,
        batched_inputs: list[dict],
        labelled: dict[str, list[int]],
        extract: Callable[[tuple[int, ...]], HeadInputs],
    ) -> dict[str, Tensor]:
        """The heads' weighted losses, the same names in every process."""
        shares, normalizers = self._count(batched_inputs, labelled)
        weights = {name: self.loss_weights[name] for name, share in shares.items() if share}
        balanced = self.balance_gradients and self.stage == "lora" and len(weights) > 1
        union = tuple(sorted({i for rows in labelled.values() for i in rows}))
        idle = bool(weights) and not union
        if weights and is_sharded(
            self.backbone
        ):  # the others need this process's pieces, forward and backward
            union = tuple(range(len(batched_inputs)))
        losses: dict[str, Tensor] = {}
        if union:
            inputs = extract(union)
            maps = balanced_copies(inputs.features, weights) if balanced else {}
            for name, rows in labelled.items():
                if rows:
                    own = replace(inputs, features=maps.get(name, inputs.features))
                    own = own.select([union.index(i) for i in rows])
                    found = self.heads[name].losses(own, normalizers[name])
                    losses |= {f"{name}/{key}": self.loss_weights[name] * loss for key, loss in found.items()}
        if any(0 < share < 1 for share in shares.values()):
            losses = distributed.with_all_names(losses, self.device)
        if idle and union:
            distributed.add_zero(losses, sum((0 * f).sum() for f in (maps or {"": inputs.features}).values()))
        if balanced and not union:  # the other processes wait for this one's norms, in their backward pass
            copies = balanced_copies(distributed.zero_for(self.backbone.parameters(), self.device), weights)
            distributed.add_zero(losses, 0 * sum(copies.values()))
        return losses

    def _count(
        self, batched_inputs: list[dict], labelled: dict[str, list[int]]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """By head: the share of the processes that have labels for it, and its normalizers' mean over processes."""
        counts = {}
        for name, rows in labelled.items():
            self.heads[name].draw()
            normalizers = self.heads[name].normalizers([batched_inputs[i] for i in rows])
            counts[name] = torch.cat([torch.tensor([float(bool(rows))]), normalizers.flatten()])
        means = distributed.means_over_processes(counts, self.device)
        # One wait for all.
        shares = torch.stack([mean[0] for mean in means.values()]).tolist() if means else []
        normalizers = {name: mean[1:].float() for name, mean in means.items()}
        return dict(zip(means, shares, strict=True)), normalizers

    def inference(self, batched_inputs: list[dict]) -> list[dict]:
        """What each head predicts, in coordinates of the original images, under its name.

        `instances`, which detectron2's COCOEvaluator scores, is the output of the last head that predicts masks,
        else of the first that predicts boxes. `caption` is that of the first caption head.

        With an open vocabulary, the proposals of heads that make some are named by it. Detections of other heads, under
        the classes they learnt, are left out.
        """
        inputs = self.extract(batched_inputs)
        results: list[dict] = [{} for _ in batched_inputs]
        for name, head in self.heads.items():
            named = self.open_vocabulary is not None and hasattr(head, "proposals")
            outputs = self.open_vocabulary.inference(head, inputs) if named else head.inference(inputs)
            for result, output in zip(results, outputs, strict=True):
                if named or self.open_vocabulary is None or not isinstance(output, Instances):
                    result[name] = output
        for result in results:
            detections = [output for output in result.values() if isinstance(output, Instances)]
            masks = [output for output in detections if output.has("pred_masks")]
            if detections:
                result["instances"] = masks[-1] if masks else detections[0]
            captions = [output for output in result.values() if isinstance(output, Caption)]
            if captions:
                result["caption"] = captions[0]
        return results

    def extract(self, images: list[dict]) -> HeadInputs:
        """Normalise, pad with zeros at the bottom and the right, run the tower.

        A cell is padding where its corner pixel is (nearest resampling).
        """
        pixels = [image["image"].to(self.device, non_blocking=True) for image in images]
        batch = ImageList.from_tensors(
            [(image - self.pixel_mean) / self.pixel_std for image in pixels],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "lora"):
            features = self.backbone(batch.tensor)[self.feature]
        image_sizes = [tuple(int(side) for side in size) for size in batch.image_sizes]
        padded_size = (batch.tensor.shape[-2], batch.tensor.shape[-1])
        # Made on the CPU: slices of one GPU tensor for each image would be launches for nothing.
        padding = torch.ones(len(images), 1, *padded_size)
        for row, (height, width) in zip(padding, image_sizes, strict=True):
            row[:, :height, :width] = 0
        mask = nn.functional.interpolate(padding, size=features.shape[-2:], mode="nearest")
        mask = mask[:, 0].bool().to(self.device, non_blocking=True)
        return HeadInputs(features, mask, list(images), image_sizes, padded_size)

    def _pixel_values(self, name: str, given: Sequence[float] | None) -> Tensor:
        """Mean or standard deviation `[3]` of R, G, B, in units of 0..255."""
        if given is not None:
            values = torch.as_tensor(given, dtype=torch.float32).flatten()
            if values.numel() != 3:
                raise ConfigError(f"MODEL.PIXEL_{name.upper()} has {values.numel()} numbers; give three")
            return values
        if not hasattr(self.backbone, name):
            raise ConfigError(f"the backbone has no `{name}` of its own: set MODEL.PIXEL_{name.upper()}")
        return 255 * torch.as_tensor(getattr(self.backbone, name), dtype=torch.float32).flatten()
