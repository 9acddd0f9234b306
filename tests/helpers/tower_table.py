"""Prints a table of towers: how near each is to open_clip's own, and what LoRA does to it, as Markdown.

python tests/helpers/tower_table.py                  small random instances of every flavour (families.py)
python tests/helpers/tower_table.py ViT-L-14 ...     towers of open_clip at their real size, with random weights

image_embedding: largest difference to `encode_image(images, normalize=False)` at the native size, relative to the
largest entry. B = 0: whether a fresh LoRA on all projections changes a bit of map or embedding. merge: the map's
relative difference between LoRA computed beside the weights and merged into them. unmerge: whether the weights are as
before, to the bit.
"""

import argparse
from collections.abc import Iterator

import torch
from families import NATIVE, TIMM, images_for, randomise, relative, small_clip

from visft.modeling.backbone import CLIPViT, lora, open_clip_models

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
COLUMNS = ("tower", "parameters", "image_embedding", "B = 0", "merge", "unmerge")


@torch.no_grad()
def row(clip: torch.nn.Module, batch: int) -> tuple[str, ...]:
    """The figures of one tower, which is left with LoRA in it."""
    images = images_for(clip, batch)
    expected = clip.encode_image(images, normalize=False)
    parameters = sum(parameter.numel() for parameter in clip.visual.parameters())
    backbone = CLIPViT(clip.visual).eval()
    embedding = backbone.image_embedding(images)
    before = embedding, backbone(images)["last_feat"]

    lora.inject(backbone, rank=4, targets=TARGETS)
    same = torch.equal(backbone.image_embedding(images), before[0])
    same &= torch.equal(backbone(images)["last_feat"], before[1])

    for name, parameter in backbone.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    beside = backbone(images)["last_feat"]
    assert relative(beside, before[1]) > 1e-6, "LoRA would not be tested"
    adapted = {site.weight_name for site in lora.sites(backbone)}
    weights = {name: p.clone() for name, p in backbone.named_parameters() if name in adapted}
    lora.merge(backbone)
    merged = relative(backbone(images)["last_feat"], beside)
    lora.unmerge(backbone)
    now = dict(backbone.named_parameters())
    exact = all(torch.equal(now[name], weight) for name, weight in weights.items())
    difference = f"{relative(embedding, expected):.1e}"
    words = ("identical" if same else "differs", f"{merged:.1e}", "identical" if exact else "differs")
    return f"{parameters / 1e6:.1f} M", difference, *words


def rows(names: list[str]) -> Iterator[tuple[str, ...]]:
    """A row for each tower of real size, or for each small one where no name is given."""
    for name in names:
        torch.manual_seed(0)
        clip = open_clip_models.open_clip().create_model(name).eval()
        randomise(clip.visual)
        yield name, *row(clip, batch=1)
    for name in () if names else (*NATIVE, *TIMM):
        yield f"{name}, small", *row(small_clip(name), batch=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How near towers are to open_clip's own, as a Markdown table."
    )
    parser.add_argument(
        "names", nargs="*", metavar="TOWER", help="of real size; default: all flavours, small"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for cells in rows(parser.parse_args().names):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
