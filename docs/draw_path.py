"""Draw docs/path.png: the path from pixels and words to an answer.

Run:  python docs/draw_path.py  (needs the extra "train", for matplotlib)
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PIXELS, PROCESSOR, VISION, FUSION, LANGUAGE = "#f3efe6", "#e7e7ea", "#cfe3f5", "#f7dcb8", "#d5ead0"
INK = "#222222"


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, title: str, note: str = "") -> None:
    """A rounded box around (x, y) with a bold title and a note below it."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=1))
    axes.text(
        x, y + (0.16 if note else 0), title, ha="center", va="center", fontsize=10.5, fontweight="bold", color=INK
    )
    if note:
        axes.text(x, y - 0.2, note, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", side: int = 1) -> None:
    """An arrow with a label to its right (side 1) or left (side -1)."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.1))
    if label:
        x, y = (start[0] + end[0]) / 2 + 0.1 * side, (start[1] + end[1]) / 2
        axes.text(x, y, label, ha="left" if side > 0 else "right", va="center", fontsize=8.3, style="italic", color=INK)


def draw(axes: Axes) -> None:
    """All of it, from top to bottom."""
    frame = {"facecolor": "none", "edgecolor": "#7a8fa3", "linestyle": (0, (4, 3))}
    axes.add_patch(Rectangle((0.3, 4.35), 7.0, 4.3, **frame))
    note = "once per frame:\ndoes not see\nthe question"
    axes.text(7.2, 8.5, note, fontsize=8.3, color="#4f6478", ha="right", va="top")

    box(axes, 3.0, 10.55, 4.6, 0.8, PIXELS, "image, video, or frames", "one by one; an HD frame has five views")
    box(axes, 9.0, 10.55, 2.8, 0.8, PIXELS, "question", "and earlier turns")
    box(axes, 5.5, 9.4, 9.8, 0.5, PROCESSOR, "processor")
    arrow(axes, (3.0, 10.13), (3.0, 9.68))
    arrow(axes, (9.0, 10.13), (9.0, 9.68))

    box(axes, 3.0, 7.95, 4.0, 0.8, VISION, "vision tower", "CLIP, up to its last-but-one layer")
    arrow(axes, (3.0, 9.13), (3.0, 8.38), "pixels")
    box(axes, 2.1, 6.4, 2.9, 0.8, VISION, "reducer", "a learned query reads all")
    box(axes, 2.1, 5.2, 2.9, 0.5, VISION, "projector")
    box(axes, 5.6, 5.2, 2.9, 0.5, VISION, "projector")
    arrow(axes, (2.1, 7.53), (2.1, 6.83), "576 patches")
    arrow(axes, (4.5, 7.53), (5.6, 5.48), "576 patches")
    arrow(axes, (2.1, 5.97), (2.1, 5.48), "1 token")
    arrow(axes, (9.0, 9.13), (9.0, 3.93), "words,\nembedded")

    box(
        axes,
        5.5,
        3.5,
        9.8,
        0.8,
        FUSION,
        "pre-fusion",
        "rows [ patches | reduced | text ] under a causal mask, 4 decoder layers",
    )
    arrow(axes, (2.1, 4.93), (2.1, 3.93))
    arrow(axes, (5.6, 4.93), (5.6, 3.93))

    box(axes, 5.5, 2.15, 9.8, 0.5, PROCESSOR, "splice: vision tokens stand where the frames stood")
    arrow(axes, (2.1, 3.07), (2.1, 2.43), "1 vision token per frame")
    arrow(axes, (6.6, 3.07), (6.6, 2.43), "fused text, mean over the frames")

    box(axes, 5.5, 0.75, 9.8, 0.8, LANGUAGE, "language model, unmodified", "Llama, Vicuna, Mistral, Qwen2 or Qwen3")
    arrow(axes, (5.5, 1.88), (5.5, 1.18), "FusedPrompt: plain embeddings")
    arrow(axes, (5.5, 0.33), (5.5, -0.2), "answer")


def main() -> None:
    """Write the file."""
    figure, axes = plt.subplots(figsize=(8.4, 8.2))
    axes.set_xlim(0.2, 10.8)
    axes.set_ylim(-0.25, 11.0)
    axes.axis("off")
    draw(axes)
    figure.savefig(Path(__file__).with_name("path.png"), dpi=130, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main()
