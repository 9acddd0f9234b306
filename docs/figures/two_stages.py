"""Draw the two stages of ViSFT: `python docs/figures/two_stages.py` writes docs/images/two_stages.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "visft", "font.size": 11}

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

FROZEN, TRAINED, INK = "#dbe7f3", "#ffd9a8", "#1f2933"
HEADS = ["detection", "segmentation", "captioning", "text encoder"]


def box(axes, x, y, width, height, text, trained, size=11):
    """A rounded box with its lower left corner at (x, y)."""
    colour = TRAINED if trained else FROZEN
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=INK
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, fontsize=size)


def arrow(axes, start, end, colour=INK, style="-|>"):
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=12, color=colour, shrinkA=2, shrinkB=2)
    )


def stage(axes, title, heads_train, lora_trains):
    axes.set(xlim=(0, 9), ylim=(0, 4.6))
    axes.axis("off")
    axes.text(0.1, 4.3, title, fontsize=13, weight="bold", color=INK, va="center")
    box(axes, 0.1, 1.5, 1.2, 1.2, "image", False)
    box(axes, 2.2, 1.2, 2.6, 1.8, "", False)
    axes.text(3.5, 2.6, "CLIP vision tower", ha="center", va="center", color=INK)
    if lora_trains:
        box(axes, 2.5, 1.4, 2.0, 0.7, "LoRA", True)
    arrow(axes, (1.3, 2.1), (2.2, 2.1))
    for row, name in enumerate(HEADS):
        y = 3.1 - row
        without_weights = name == "text encoder"
        if heads_train and without_weights:
            continue
        box(axes, 6.2, y, 2.6, 0.7, f"{name} head" if not without_weights else name, heads_train)
        arrow(axes, (4.8, 2.1), (6.2, y + 0.35))


def main():
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 3.5))
    stage(left, "Stage heads: heads learn to read the features", True, False)
    stage(right, "Stage lora: better features lower the heads' losses", False, True)
    for x, colour, text in ((0.02, TRAINED, "trains"), (0.10, FROZEN, "frozen")):
        figure.patches.append(
            plt.Rectangle(
                (x, 0.03), 0.018, 0.05, transform=figure.transFigure, facecolor=colour, edgecolor=INK
            )
        )
        figure.text(x + 0.023, 0.055, text, va="center", color=INK)
    figure.text(
        0.98,
        0.055,
        "Afterwards: heads are dropped, LoRA is merged, open_clip loads the tower.",
        ha="right",
        va="center",
        color=INK,
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.08, wspace=0.03)
    output = Path(__file__).parents[1] / "images" / "two_stages.svg"
    figure.savefig(output, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
