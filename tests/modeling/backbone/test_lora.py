"""LoRA: what it computes, what it leaves alone, and that merging comes apart again."""

import copy

import pytest
import torch
from families import DEPTH, NATIVE, TIMM, images_for, relative, small_clip
from torch.utils.flop_counter import FlopCounterMode

from visft.errors import CheckpointError, ConfigError
from visft.modeling.backbone import CLIPViT, lora

ALL = ("q", "k", "v", "proj", "fc1", "fc2")
KINDS = (
    "ViT-B-16-quickgelu",
    "ViT-B-16-SigLIP",
    "EVA01-g-14",
    "EVA02-B-16",
    "EVA02-E-14-plus",
    "PE-Core-B-16",
)


def randomise_b(backbone: CLIPViT, scale: float = 0.5) -> CLIPViT:
    for name, parameter in backbone.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=scale)
    return backbone


def with_lora(name: str, **options) -> CLIPViT:
    return randomise_b(
        lora.inject(CLIPViT(small_clip(name).visual).eval(), **({"rank": 4, "alpha": 2} | options))
    )


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE + TIMM)
def test_nothing_changes_at_first(name):
    clip = small_clip(name)
    images = images_for(clip)
    backbone = CLIPViT(clip.visual).eval()
    before = backbone(images)["last_feat"], backbone.image_embedding(images)
    names = set(backbone.state_dict())
    lora.inject(backbone, rank=4, targets=ALL)
    assert torch.equal(backbone(images)["last_feat"], before[0])
    assert torch.equal(backbone.image_embedding(images), before[1])
    added = set(backbone.state_dict()) - names
    assert added and added == set(lora.state_dict(backbone))
    assert all((".blocks." in n or ".resblocks." in n) and "pool" not in n for n in added)


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE + TIMM)
@pytest.mark.parametrize("targets", [("q", "v"), ALL])
def test_the_update_is_scaled_b_times_a(name, targets):
    clip = small_clip(name)
    images = images_for(clip)
    plain = copy.deepcopy(clip)
    backbone = randomise_b(lora.inject(CLIPViT(clip.visual).eval(), rank=4, alpha=2, targets=targets))
    weights = dict(plain.visual.named_parameters())
    for key, a in lora.state_dict(backbone).items():
        if not key.endswith("lora_A"):
            continue
        block, _, projection = key.removeprefix("tower.").removesuffix(".lora_A").partition(".lora.")
        update = 2 / 4 * lora.state_dict(backbone)[key[:-1] + "B"] @ a
        fused = {"q": 0, "k": 1, "v": 2}
        for weight in (f"{block}.attn.in_proj_weight", f"{block}.attn.qkv.weight"):
            if projection in fused and weight in weights:
                weights[weight].chunk(3)[fused[projection]].add_(update)
        separate = {
            "proj": ("attn.proj", "attn.out_proj"),
            "fc1": ("mlp.fc1", "mlp.c_fc"),
            "fc2": ("mlp.fc2", "mlp.c_proj"),
        }
        for module in separate.get(projection, (f"attn.{projection}_proj", f"mlp.{projection}")):
            if f"{block}.{module}.weight" in weights:
                weights[f"{block}.{module}.weight"].add_(update)
    expected = plain.encode_image(images, normalize=False)
    found = backbone.image_embedding(images)
    # Where LayerScale is 1e-4, LoRA does little; then it is the difference that must agree.
    backbone_off = CLIPViT(copy.deepcopy(clip.visual)).eval()
    for block in backbone_off.blocks:
        del block.lora
    without = backbone_off.image_embedding(images)
    assert relative(found, expected) < 1e-5
    assert relative(found - without, expected - without) < 2e-3
    assert relative(expected, without) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_merge_and_unmerge(name):
    backbone = with_lora(name, targets=ALL)
    images = torch.randn(2, 3, 70, 56)
    before = copy.deepcopy(backbone.state_dict())
    output = backbone(images)["last_feat"]
    lora.merge(backbone)
    assert lora.is_merged(backbone)
    assert relative(backbone(images)["last_feat"], output) < 1e-5
    merged = {n: t for n, t in backbone.tower.state_dict().items() if "lora" not in n}
    adapted = {site.weight_name.removeprefix("tower.") for site in lora.sites(backbone)}
    assert adapted == {n for n in merged if not torch.equal(merged[n], before[f"tower.{n}"])}
    with pytest.raises(ConfigError, match="merged already"):
        lora.merge(backbone)
    with pytest.raises(ConfigError, match="merged already"):
        lora.load_state_dict(backbone, lora.state_dict(backbone))
    lora.unmerge(backbone)
    assert not lora.is_merged(backbone)
    after = backbone.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(backbone(images)["last_feat"], output)
    with pytest.raises(ConfigError, match="not merged"):
        lora.unmerge(backbone)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_lora_alone_and_are_those_of_the_dense_update(name):
    backbone = with_lora(name).train()
    images = torch.randn(2, 3, 70, 56)
    target = torch.randn_like(backbone(images)["last_feat"])
    dense = copy.deepcopy(backbone)
    (backbone(images)["last_feat"] * target).sum().backward()
    reached = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert reached == set(lora.state_dict(backbone))
    # The same network with its update in the weights, differentiated by the weights: dB = s dW A^T, dA = s B^T dW.
    lora.merge(dense).set_train("full")
    dense.tower.eval()
    (dense(images)["last_feat"] * target).sum().backward()
    for site, reference in zip(lora.sites(backbone), lora.sites(dense), strict=True):
        adapter, p = site.adapter, site.projection
        grad = reference.weight.grad[p.start : p.stop]
        assert relative(adapter.lora_B.grad, adapter.scaling * grad @ adapter.lora_A.T) < 1e-3
        assert relative(adapter.lora_A.grad, adapter.scaling * adapter.lora_B.T @ grad) < 1e-3
        assert reference.adapter.lora_A.grad is None


def saved_tensors(backbone: CLIPViT, images: torch.Tensor) -> int:
    count = 0

    def pack(tensor):
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(images)
    return count


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "EVA02-B-16"])
def test_no_graph_below_the_first_block_with_lora(name):
    images = torch.randn(1, 3, 64, 64)
    backbone = CLIPViT(small_clip(name).visual).train()
    assert saved_tensors(backbone, images) == 0
    assert not backbone(images)["last_feat"].requires_grad
    counts = []
    for last in (1, 2, DEPTH):
        backbone = with_lora(name, last_blocks=last).train()
        assert {site.block for site in lora.sites(backbone)} == set(range(DEPTH - last, DEPTH))
        counts.append(saved_tensors(backbone, images))
    assert (
        counts[1] - counts[0] == counts[2] - counts[1] > 0
    )  # the same for each block, nothing for embeddings
    backbone.set_train("none")
    assert saved_tensors(backbone, images) == 0


@torch.no_grad()
def test_low_rank_in_every_forward():
    clip = small_clip("EVA02-B-16")
    backbone, images = CLIPViT(clip.visual).eval(), torch.randn(1, 3, 64, 64)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            backbone(images)
        return counter.get_total_flops()

    before = flops()
    lora.inject(backbone, rank=4)
    tokens, width = 4 * 4 + 1, 64
    assert flops() - before == DEPTH * 2 * 2 * tokens * 4 * (width + width)
    lora.merge(backbone)
    assert flops() == before


def test_dropout_acts_in_training_only():
    backbone = with_lora("ViT-B-16-quickgelu", dropout=0.5)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(images)["last_feat"], backbone(images)["last_feat"])
    backbone.train()
    assert not torch.equal(backbone(images)["last_feat"], backbone(images)["last_feat"])
    backbone.set_train("none")
    assert torch.equal(backbone(images)["last_feat"], backbone(images)["last_feat"])


def test_initialisation():
    backbone = lora.inject(CLIPViT(small_clip("EVA01-g-14").visual))
    tensors = lora.state_dict(backbone)
    assert len(tensors) == DEPTH * 2 * 2
    for name, tensor in tensors.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:  # Kaiming-uniform with a = sqrt(5): bound 1 / sqrt(fan in)
            assert tensor.shape == (64, 64) and 0.9 / 8 < tensor.abs().max() <= 1 / 8


def test_state_dict_round_trip_and_what_does_not_fit():
    first, second = with_lora("EVA02-B-16"), with_lora("EVA02-B-16")
    torch.nn.init.normal_(next(lora.sites(second)).adapter.lora_A)
    tensors = {name: tensor.clone() for name, tensor in lora.state_dict(second).items()}
    lora.load_state_dict(first, tensors)
    assert all(torch.equal(t, tensors[n]) for n, t in lora.state_dict(first).items())
    before = copy.deepcopy(lora.state_dict(first))
    some = next(iter(tensors))
    for broken, message in (
        ({n: t for n, t in tensors.items() if n != some}, "lacks 1 of"),
        (tensors | {"tower.blocks.99.lora.q.lora_A": tensors[some]}, "no place for"),
        (tensors | {some: torch.zeros(5, 64)}, r"\[5, 64\], expected \[4, 64\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            lora.load_state_dict(first, broken)
    assert all(torch.equal(t, before[n]) for n, t in lora.state_dict(first).items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ("q", "w")}, "TARGETS: `w`"),
        ({"targets": ()}, "TARGETS is empty"),
        ({"rank": 0}, "RANK is 0"),
        ({"last_blocks": 4}, "the tower has 3 blocks"),
        ({"dropout": 1.0}, "DROPOUT is 1.0"),
    ],
)
def test_bad_arguments(options, message):
    backbone = CLIPViT(small_clip("ViT-B-32").visual)
    names = set(backbone.state_dict())
    with pytest.raises(ConfigError, match=message):
        lora.inject(backbone, **options)
    assert set(backbone.state_dict()) == names


def test_twice_or_without():
    backbone = CLIPViT(small_clip("ViT-B-32").visual)
    for function in (lora.merge, lora.unmerge):
        with pytest.raises(ConfigError, match="no LoRA"):
            function(backbone)
    with pytest.raises(ConfigError, match="call lora.inject first"):
        backbone.set_train("lora")
    lora.inject(backbone)
    with pytest.raises(ConfigError, match="already"):
        lora.inject(backbone)


@torch.no_grad()
def test_a_copy_is_independent():
    backbone = with_lora("EVA02-E-14-plus")
    images = torch.randn(1, 3, 56, 56)
    before = backbone(images)["last_feat"]
    twin = lora.merge(copy.deepcopy(backbone))
    assert torch.equal(backbone(images)["last_feat"], before) and not lora.is_merged(backbone)
    assert relative(twin(images)["last_feat"], before) < 1e-5
    lora.unmerge(twin)
    assert torch.equal(twin(images)["last_feat"], before)
