"""Draw GPT-2 from token ids to logits, with the shape of every tensor: docs/images/architecture.png for light pages,
and architecture-dark.png for dark ones.

python docs/draw_architecture.py
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

IMAGES = Path(__file__).parent / "images"
STREAM_Y = 5.3  # the height of the residual stream


@dataclass
class Palette:
    ink: str
    page: str
    stream: str
    attention: str
    feed_forward: str


# The pages are GitHub's.
LIGHT = Palette(ink="#1f2933", page="#ffffff", stream="#dbe7f6", attention="#fde7c8", feed_forward="#d9f0dd")
DARK = Palette(ink="#e6edf3", page="#0d1117", stream="#1f3a5f", attention="#5a3e12", feed_forward="#1d4a2a")


@dataclass
class Drawing:
    axes: Axes
    palette: Palette

    def text(self, x: float, y: float, text: str, size: float = 9.3, align: str = "center", **options) -> None:
        self.axes.text(x, y, text, ha=align, va="center", color=self.palette.ink, fontsize=size, **options)

    def box(self, x: float, y: float, width: float, text: str, color: str, height: float = 0.62) -> None:
        shape = {"boxstyle": "round,pad=0.02,rounding_size=0.1", "facecolor": color, "edgecolor": self.palette.ink}
        self.axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, linewidth=1, **shape))
        self.text(x + width / 2, y, text)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": self.palette.ink, "linewidth": 1}
        self.axes.add_patch(FancyArrowPatch(start, end, **style))

    def sub_layer(self, left: float, width: float, color: str, steps: list[str]) -> None:
        """A column of boxes below the stream: read on its left edge, added back on its right edge."""
        heights = [STREAM_Y - 1.1 - 1.0 * number for number in range(len(steps))]
        for y, text in zip(heights, steps, strict=True):
            self.box(left, y, width, text, color)
        center, right = left + width / 2, left + width + 0.3
        self.arrow((left + 0.3, STREAM_Y), (left + 0.3, heights[0] + 0.33))
        for upper, lower in pairwise(heights):
            self.arrow((center, upper - 0.33), (center, lower + 0.33))
        corners = [left + width + 0.03, right, right], [heights[-1], heights[-1], STREAM_Y - 0.16]
        self.axes.plot(*corners, color=self.palette.ink, linewidth=1)
        circle = {"boxstyle": "circle,pad=0.12", "facecolor": self.palette.page, "edgecolor": self.palette.ink}
        self.text(right, STREAM_Y, "+", size=13, bbox=circle)


def draw(palette: Palette) -> Figure:
    figure = Figure(figsize=(11, 4.6), facecolor=palette.page, layout="constrained")
    axes = figure.add_subplot(xlim=(0, 16.2), ylim=(0, 6.4))
    axes.axis("off")
    drawing = Drawing(axes, palette)

    drawing.box(0.2, STREAM_Y, 1.9, "embed_tokens +\nembed_positions", palette.stream, height=0.9)
    drawing.box(12.3, STREAM_Y, 1.2, "norm", palette.stream)
    drawing.box(14.2, STREAM_Y, 1.6, "lm_head", palette.stream)
    drawing.arrow((2.12, STREAM_Y), (12.28, STREAM_Y))
    drawing.arrow((13.52, STREAM_Y), (14.18, STREAM_Y))
    drawing.text(2.6, STREAM_Y + 0.22, "(B, T, C)", size=8.5)
    drawing.text(7.2, STREAM_Y + 0.65, "residual stream: every sub-layer reads it and adds to it", size=10)
    drawing.text(1.15, STREAM_Y - 0.86, "ids (B, T)")
    drawing.arrow((1.15, STREAM_Y - 0.68), (1.15, STREAM_Y - 0.48))
    drawing.text(15.0, STREAM_Y - 0.86, "logits (B, T, V)")
    drawing.arrow((15.0, STREAM_Y - 0.34), (15.0, STREAM_Y - 0.66))

    frame = {"boxstyle": "round,pad=0.05,rounding_size=0.2", "facecolor": "none", "edgecolor": palette.ink}
    axes.add_patch(FancyBboxPatch((3.1, 0.35), 8.7, 5.35, linewidth=1.2, linestyle="--", **frame))
    drawing.text(11.7, 0.6, "x n_layer", size=11, align="right", weight="bold")
    attention = ["attn_norm", "q, k, v: 3 x (B, H, T, D)", "softmax(q kᵀ / √D, causal): (B, H, T, T)"]
    drawing.sub_layer(3.5, 4.0, palette.attention, [*attention, "weights @ v, out_proj: (B, T, C)"])
    feed_forward = ["mlp_norm", "up_proj: (B, T, 4C)", "GELU", "down_proj: (B, T, C)"]
    drawing.sub_layer(8.3, 3.1, palette.feed_forward, feed_forward)
    sizes = "GPT-2 small: C = 768, H = 12, D = 64, V = 50,257, n_layer = 12, 124,439,808 parameters"
    figure.text(0.5, 0.005, sizes, ha="center", va="bottom", color=palette.ink, fontsize=9.5)
    return figure


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, palette in (("architecture", LIGHT), ("architecture-dark", DARK)):
        draw(palette).savefig(IMAGES / f"{name}.png", dpi=150)
        print(IMAGES / f"{name}.png")
