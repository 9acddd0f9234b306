"""CLIPViT as detectron2 and a trainer see it: what trains, memory options, padding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params
from families import NATIVE, TIMM, images_for, relative, small_clip
from other_device import DEVICE, other_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT, lora, lr_factor
from visft.modeling.backbone.recompute import Budget

SOME = ("ViT-B-16-quickgelu", "ViT-B-16-SigLIP", "EVA02-B-16", "EVA02-E-14-plus")


@torch.no_grad()
@pytest.mark.parametrize("class_token", ["keep", "drop"])
def test_sides_that_the_stride_does_not_divide_are_padded_with_zeros(class_token):
    backbone = CLIPViT(small_clip("EVA02-B-16").visual, class_token=class_token).eval()
    images = torch.randn(2, 3, 50, 65)
    features = backbone(images)["last_feat"]
    assert features.shape == (2, 64, 4, 5) and features.is_contiguous()
    assert torch.equal(features, backbone(F.pad(images, (0, 15, 0, 14)))["last_feat"])


def test_what_detectron2_asks():
    backbone = CLIPViT(small_clip("EVA01-g-14").visual, patch_size=16)
    shape = backbone.output_shape()["last_feat"]
    assert (shape.channels, shape.stride) == (64, 16)
    assert backbone.size_divisibility == backbone.padding_constraints["size_divisibility"] == 16


@torch.no_grad()
def test_dropping_the_class_token_changes_features_and_uses_no_class_parameter():
    clip = small_clip("ViT-B-16-quickgelu")
    images = torch.randn(1, 3, 96, 64)
    keep = CLIPViT(clip.visual).eval()(images)["last_feat"]
    dropping = CLIPViT(clip.visual, class_token="drop").eval()
    drop = dropping(images)["last_feat"]
    assert relative(drop, keep) > 1e-2
    clip.visual.class_embedding.fill_(float("nan"))
    clip.visual.positional_embedding[0].fill_(float("nan"))
    assert torch.equal(dropping(images)["last_feat"], drop)


@pytest.mark.parametrize("class_token", ["keep", "drop"])
@pytest.mark.parametrize("name", NATIVE + TIMM)
def test_all_that_trains_in_full_mode_gets_a_gradient(name, class_token):
    clip = small_clip(name)
    backbone = CLIPViT(clip.visual, class_token=class_token, train="full").train()
    backbone(images_for(clip))["last_feat"].square().mean().backward()
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    reached = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert trained == reached  # or distributed training would wait for the rest
    # Only the way from the map to the CLIP embedding stays.
    left = {n for n, _ in backbone.named_parameters()} - trained
    outside = ("pool", "proj", "head", "ln_post", "fc_norm", "cls_token", "class_embedding")
    assert all(any(part in n for part in outside) and "blocks" not in n for n in left), left


def test_modes():
    backbone = lora.inject(CLIPViT(small_clip("EVA02-B-16").visual), rank=2)
    adapters = set(lora.state_dict(backbone))

    def trains():
        return {n for n, p in backbone.named_parameters() if p.requires_grad}

    assert trains() == adapters
    backbone.set_train("full")
    assert trains() and not trains() & adapters
    backbone.set_train("none")
    assert not trains()
    backbone.set_train("lora")
    assert trains() == adapters
    with pytest.raises(ConfigError, match="TRAIN: `some` is unknown"):
        backbone.set_train("some")


def test_a_frozen_tower_behaves_as_in_evaluation():
    # This architecture has stochastic depth in training.
    backbone = CLIPViT(small_clip("MobileCLIP2-L-14").visual).train()
    images = torch.randn(2, 3, 56, 56)
    assert torch.equal(backbone(images)["last_feat"], backbone(images)["last_feat"])
    backbone.set_train("full")
    assert not torch.equal(backbone(images)["last_feat"], backbone(images)["last_feat"])
    backbone.eval()
    assert torch.equal(backbone(images)["last_feat"], backbone(images)["last_feat"])


def loss_and_gradients(backbone, images):
    torch.manual_seed(0)
    loss = backbone(images)["last_feat"].square().mean()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}


def kept(backbone, images) -> int:
    """Bytes that a pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(images)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "EVA01-g-14"])
@pytest.mark.parametrize("low", ["", "bfloat16"])
def test_lora_keeps_what_its_gradient_needs_and_no_more(name, low):
    """By block: the inputs of both norms and of the activation, LoRA's input, q, k, v and the attention's output."""
    backbone = CLIPViT(small_clip(name).visual, frozen_dtype=low)
    lora.inject(backbone, rank=1).set_train("lora")
    images = torch.randn(2, 3, 112, 112)
    block, size = backbone.blocks[0], 2 * ((112 // backbone.stride) ** 2 + 1) * backbone.embed_dim
    hidden = next(layer for layer in block.mlp.modules() if isinstance(layer, torch.nn.Linear)).out_features
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(low)):
        found = kept(backbone, images) / len(backbone.blocks) / size
    matrices = 5 + hidden / backbone.embed_dim * (2 if "quickgelu" in name else 1)  # its sigmoid, too
    expected = 4 * (2 + matrices) if not low else 2 * 4 + 2 * matrices
    assert expected <= found < 1.1 * expected


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_activation_checkpointing_gives_the_same_gradients_from_less_memory(name, mode):
    plain = lora.inject(CLIPViT(small_clip(name).visual, window_size=2), rank=2, dropout=0.3)
    for site in lora.sites(plain):
        torch.nn.init.normal_(site.adapter.lora_B)
    plain.set_train(mode)
    plain.train()
    saving, between = copy.deepcopy(plain), copy.deepcopy(plain)
    saving.activation_checkpointing = between.activation_checkpointing = True
    images = torch.randn(2, 3, 80, 64)
    all_kept, none_kept = kept(plain, images), kept(saving, images)
    assert none_kept < all_kept / 3
    block = (all_kept - none_kept) / len(plain.blocks)
    between.memory_budget = Budget(1.5 * block / 2**30)  # room for one of three blocks
    assert none_kept + 0.7 * block < kept(between, images) < none_kept + 1.3 * block
    between.memory_budget = Budget(1.5 * block / 2**30)  # so that the block is measured within the step
    loss, gradients = loss_and_gradients(plain, images)
    for backbone in (saving, between):
        loss_again, gradients_again = loss_and_gradients(backbone, images)
        assert loss == loss_again and gradients.keys() == gradients_again.keys()
        assert all(torch.equal(gradients[n], gradients_again[n]) for n in gradients)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_is_not_computed_again(name, rate):
    """Unless it drops something, by which it moves the generator that other dropout draws from."""
    plain = lora.inject(CLIPViT(small_clip(name).visual), rank=2, dropout=0.3)
    for site in lora.sites(plain):
        torch.nn.init.normal_(site.adapter.lora_B)
    for block in plain.blocks:
        if isinstance(block.attn, torch.nn.MultiheadAttention):
            block.attn.dropout = rate
        else:
            block.attn.attn_drop.p = rate
    plain.set_train("full")
    for adapters in plain.adapters:
        adapters.requires_grad_(True).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing = True
    images = torch.randn(2, 3, 64, 64)
    with Attentions() as once:
        expected = loss_and_gradients(plain, images)
    with Attentions() as again:
        found = loss_and_gradients(saving, images)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][n], expected[1][n]) for n in expected[1])
    if rate:
        assert again.count == once.count == 0  # by products
    else:
        assert again.count == once.count == len(plain.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retain", [False, True])
def test_checkpointing_under_autocast_of_two_passes(dtype, retain):
    """Autocast casts LoRA's weights once for both passes, but for each when they are computed again."""
    plain = lora.inject(CLIPViT(small_clip("ViT-B-16-quickgelu").visual), rank=2)
    for site in lora.sites(plain):
        torch.nn.init.normal_(site.adapter.lora_B)
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing = True
    images, found = torch.randn(2, 3, 64, 64), []
    for backbone in (plain, saving):
        with torch.autocast("cpu", dtype):
            loss = sum(backbone(part)["last_feat"].float().square().mean() for part in (images, images + 1))
        for again in range(1 + retain):
            backbone.zero_grad()
            loss.backward(retain_graph=retain and not again)
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert found[0] and all(map(torch.equal, *found))


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_inputs_of_blocks_are_not_kept_on_the_device(offload):
    options = {"activation_checkpointing": True, "offload_activations": offload}
    backbone = lora.inject(CLIPViT(small_clip("ViT-B-16-quickgelu").visual, **options), rank=2)
    inputs = []
    for block in backbone.blocks[1:]:  # the first one's input needs no gradient
        block.register_forward_pre_hook(lambda module, arguments: inputs.append(TensorWeakRef(arguments[0])))
    with other_device():
        backbone.to(DEVICE)
        found = backbone(torch.randn(2, 3, 64, 64).to(DEVICE))
        assert [ref() is None for ref in inputs] == [offload] * (len(backbone.blocks) - 1)
        found["last_feat"].sum().backward()
    assert len(inputs) == 2 * (len(backbone.blocks) - 1)


class Attentions(TorchDispatchMode):
    """Counts the forward passes of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_in_low_precision_compute_as_if_rounded(name, dtype):
    """To the precision of the type, which the activations are rounded to as well."""
    rounded = lora.inject(CLIPViT(small_clip(name).visual), rank=2)
    for site in lora.sites(rounded):
        torch.nn.init.normal_(site.adapter.lora_B)
    stored = CLIPViT(copy.deepcopy(small_clip(name).visual), frozen_dtype=dtype)
    lora.inject(stored, rank=2)
    lora.load_state_dict(stored, lora.state_dict(rounded))
    low = getattr(torch, dtype)
    with torch.no_grad():
        for block in rounded.blocks:
            for n, p in block.named_parameters():
                if p.ndim > 1 and "lora" not in n:
                    p.copy_(p.to(low))
    bulk = [p for b in stored.blocks for n, p in b.named_parameters() if p.ndim > 1 and "lora" not in n]
    assert bulk and all(p.dtype == low for p in bulk)
    assert all(p.dtype == torch.float32 for p in lora.state_dict(stored).values())
    images = torch.randn(2, 3, 64, 64)
    loss, gradients = loss_and_gradients(rounded.train(), images)
    loss_again, gradients_again = loss_and_gradients(stored.train(), images)
    assert loss_again == pytest.approx(loss, rel={"bfloat16": 0.02, "float16": 0.003}[dtype])
    limit = {"bfloat16": 0.1, "float16": 0.02}[dtype]
    assert all(relative(gradients_again[n], gradients[n]) < limit for n in gradients)
    before = copy.deepcopy(stored.state_dict())
    lora.merge(stored)
    lora.unmerge(stored)
    assert all(torch.equal(t, before[n]) for n, t in stored.state_dict().items())
    with pytest.raises(ConfigError, match="FROZEN_DTYPE"):
        stored.set_train("full")


class Conversions(TorchDispatchMode):
    """Notes the shapes of tensors that are copied to another type."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is not None:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SOME)
def test_frozen_weights_are_never_converted_in_a_forward_pass(name):
    backbone = CLIPViT(small_clip(name).visual, frozen_dtype="bfloat16")
    weights = {tuple(p.shape) for b in backbone.blocks for p in b.parameters() if p.dtype == torch.bfloat16}
    with torch.no_grad(), Conversions() as conversions:
        backbone(torch.randn(1, 3, 64, 64))
    assert conversions.shapes and not conversions.shapes & weights


def test_frozen_weights_are_kept_for_the_backward_pass_in_low_precision():
    backbone = lora.inject(CLIPViT(small_clip("EVA01-g-14").visual, frozen_dtype="bfloat16"), rank=2).train()
    kept = []

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(torch.randn(1, 3, 56, 56))
    shape = tuple(backbone.blocks[1].mlp.fc1.weight.shape)
    assert {dtype for s, dtype in kept if s == shape} == {torch.bfloat16}


@pytest.mark.parametrize("frozen_dtype", ["", "bfloat16"])
@pytest.mark.parametrize("name", SOME)
def test_autocast(name, frozen_dtype):
    backbone = lora.inject(CLIPViT(small_clip(name).visual, frozen_dtype=frozen_dtype), rank=2).train()
    images = torch.randn(1, 3, 64, 64)
    exact = backbone(images)["last_feat"]
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images)["last_feat"]
    assert relative(features.float(), exact) < 0.1
    features.float().square().mean().backward()
    assert all(site.adapter.lora_B.grad.isfinite().all() for site in lora.sites(backbone))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_token": "maybe"}, "CLASS_TOKEN: `maybe` is unknown.*drop, keep"),
        ({"frozen_dtype": "int4"}, "FROZEN_DTYPE: `int4` is unknown.*bfloat16, float16"),
        ({"patch_size": -1}, "PATCH_SIZE is -1"),
        ({"train": "all"}, "TRAIN: `all` is unknown.*full, lora, none"),
        ({"train": "full", "frozen_dtype": "float16"}, "FROZEN_DTYPE"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        CLIPViT(small_clip("ViT-B-32").visual, **options)


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "EVA02-B-16"])
def test_layer_decay_as_vitdet(name):
    model = torch.nn.Module()
    model.backbone = CLIPViT(small_clip(name).visual, train="full")
    model.head = torch.nn.Linear(3, 3)
    factor = lr_factor(model, 0.7)
    for parameter, _ in model.named_parameters():
        ours = factor(parameter)
        twin = (
            parameter.replace("resblocks", "blocks")
            .replace("tower.trunk", "net")
            .replace("tower.transformer", "net")
        )
        if any(part in twin for part in ("conv1", "class_emb", "positional", "ln_pre", "cls_token")):
            twin = "backbone.net.pos_embed"  # ViTDet's rule knows its own names only
        assert ours == pytest.approx(get_vit_lr_decay_rate(twin, 0.7, 3)), parameter
    groups = get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=factor)
    rates = sorted({round(group["lr"], 6) for group in groups})
    assert rates == [round(0.7**k, 6) for k in (4, 3, 2, 1, 0)]


def test_training_after_inference_mode():
    # What is cached for a grid or a patch size must not be bound to the mode it was first needed in.
    backbone = lora.inject(CLIPViT(small_clip("EVA02-B-16").visual, patch_size=8), rank=2).train()
    images = torch.randn(1, 3, 40, 56)
    with torch.inference_mode():
        backbone(images)
    backbone(images)["last_feat"].sum().backward()
    backbone.set_train("full")
    backbone(images)["last_feat"].sum().backward()
