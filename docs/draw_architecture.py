"""Draw docs/images/architecture.png: GPT-2 from token ids to logits, with the shape of every tensor.

python docs/draw_architecture.py
"""

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PAPER, STREAM, ATTENTION, FEED_FORWARD = "#1f2933", "#ffffff", "#dbe7f6", "#fde7c8", "#d9f0dd"
OUTPUT = Path(__file__).parent / "images" / "architecture.png"


def box(axes, x, y, width, text, colour, height=0.62):
    axes.add_patch(
        FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=colour,
            edgecolor=INK,
            linewidth=1,
        )
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", color=INK, fontsize=9.3)


def arrow(axes, start, end, text="", style="-|>"):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, color=INK, linewidth=1))
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        axes.text(middle[0], middle[1] + 0.14, text, ha="center", va="bottom", color=INK, fontsize=8.5)


def draw() -> Figure:
    figure = Figure(figsize=(11, 4.6), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlim=(0, 16.2), ylim=(0, 6.4))
    axes.axis("off")

    stream = 5.3  # the height of the residual stream
    box(axes, 0.2, stream, 1.9, "embed_tokens +\nembed_positions", STREAM, height=0.9)
    box(axes, 12.3, stream, 1.2, "norm", STREAM)
    box(axes, 14.2, stream, 1.6, "lm_head", STREAM)
    arrow(axes, (2.12, stream), (12.28, stream))
    arrow(axes, (13.52, stream), (14.18, stream))
    axes.text(2.6, stream + 0.14, "(B, T, C)", ha="center", color=INK, fontsize=8.5)
    axes.text(7.2, stream + 0.55, "residual stream: every sub-layer reads it and adds to it", ha="center", color=INK)
    axes.text(1.15, stream - 0.85, "ids (B, T)", ha="center", color=INK, fontsize=9)
    arrow(axes, (1.15, stream - 0.68), (1.15, stream - 0.48))
    axes.text(15.0, stream - 0.85, "logits (B, T, V)", ha="center", color=INK, fontsize=9)
    arrow(axes, (15.0, stream - 0.34), (15.0, stream - 0.66))

    axes.add_patch(
        FancyBboxPatch(
            (3.1, 0.35),
            8.7,
            5.35,
            boxstyle="round,pad=0.05,rounding_size=0.2",
            facecolor="none",
            edgecolor=INK,
            linewidth=1.2,
            linestyle="--",
        )
    )
    axes.text(11.7, 0.5, "x n_layer", ha="right", color=INK, fontsize=11, weight="bold")
    sub_layer(axes, 3.5, 4.0, ATTENTION, ["attn_norm", "q, k, v: 3 x (B, H, T, D)",
              "softmax(q kᵀ / √D, causal): (B, H, T, T)", "weights @ v, out_proj: (B, T, C)"], stream)  # fmt: skip
    sub_layer(
        axes, 8.3, 3.1, FEED_FORWARD, ["mlp_norm", "up_proj: (B, T, 4C)", "GELU", "down_proj: (B, T, C)"], stream
    )
    figure.text(0.5, 0.005, "GPT-2 small: C = 768, H = 12, D = 64, V = 50,257, n_layer = 12, 124,439,808 parameters",
                ha="center", va="bottom", color=INK, fontsize=9.5)  # fmt: skip
    return figure


def sub_layer(axes, left: float, width: float, colour: str, steps: list[str], stream: float) -> None:
    """A column of boxes below the stream: read on its left edge, added back on its right edge."""
    heights = [stream - 1.1 - 1.0 * number for number in range(len(steps))]
    for y, text in zip(heights, steps, strict=True):
        box(axes, left, y, width, text, colour)
    centre = left + width / 2
    arrow(axes, (left + 0.3, stream), (left + 0.3, heights[0] + 0.33))
    for upper, lower in pairwise(heights):
        arrow(axes, (centre, upper - 0.33), (centre, lower + 0.33))
    right = left + width + 0.3
    axes.plot([left + width + 0.03, right, right], [heights[-1], heights[-1], stream - 0.16], color=INK, linewidth=1)
    axes.text(right, stream, "+", ha="center", va="center", color=INK, fontsize=13,
              bbox={"boxstyle": "circle,pad=0.12", "facecolor": PAPER, "edgecolor": INK})  # fmt: skip


if __name__ == "__main__":
    OUTPUT.parent.mkdir(exist_ok=True)
    draw().savefig(OUTPUT, dpi=150)
    print(OUTPUT)
