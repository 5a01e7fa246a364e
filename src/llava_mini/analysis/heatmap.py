"""Maps of attention over pictures. The picture is grey below the map, so that no colour of it is taken for attention.

Colours are those of viridis, which keep their order for the colour-blind and in print.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from llava_mini.analysis.charts import new_figure
from llava_mini.analysis.findings import Example
from llava_mini.analysis.words import MOST_WORD_LAYERS, chosen_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 8
"""Panels side by side."""

MOST_LAYERS = 15
"""Layers that are drawn."""

MOST_WORDS = 10
"""Words of a question that are drawn: the last ones."""

MOST_QUERIES = 3
"""Compression queries that are drawn: the first ones."""

_COLOURS = "viridis"


def draw_layers(example: Example) -> "Figure | None":
    """Draw the attention of the text after the image over each picture, layer by layer (Figure 4).

    None: the vision tokens have no places in a picture.
    """
    canvases = [canvas for canvas in example.canvases if canvas.paint is not None]
    if not canvases:
        return None
    layers = chosen_layers(len(example.reading), MOST_LAYERS)
    columns = min(len(layers) + 1, MOST_COLUMNS)
    rows = -(-(len(layers) + 1) // columns)
    figure = new_figure(1.5 * columns + 0.6, 1.75 * rows * len(canvases) + 0.5)
    panels = figure.subplots(rows * len(canvases), columns, squeeze=False)
    for number, canvas in enumerate(canvases):
        assert canvas.paint is not None
        axes = iter(panels[number * rows : (number + 1) * rows].flatten())
        _show(next(axes), canvas.picture, None, canvas.title)
        for layer in layers:
            total = float(example.reading[layer].sum())
            _show(next(axes), canvas.picture, canvas.paint(example.reading[layer]), f"layer {layer + 1}: {total:.0%}")
        for unused in axes:
            unused.axis("off")
    return _captioned(figure, panels, example)


def draw_frames(example: Example) -> "Figure | None":
    """Draw the attention of the text after the first frame to each frame, layer by layer. None: it is one frame."""
    by_frame = example.by_frame
    if by_frame.shape[1] < 2:
        return None
    figure = new_figure(min(3 + 0.35 * by_frame.shape[1], 10), 1.6 + 0.25 * min(len(by_frame), 20))
    axes = figure.subplots()
    image = axes.imshow(by_frame.numpy(), cmap=_COLOURS, vmin=0, aspect="auto", interpolation="nearest")
    axes.set_xlabel("frame")
    axes.set_ylabel("layer")
    for axis, length in ((axes.xaxis, by_frame.shape[1]), (axes.yaxis, len(by_frame))):
        step = max(-(-length // 20), 1)
        axis.set_ticks(range(0, length, step), [str(place + 1) for place in range(0, length, step)])
    figure.colorbar(image, ax=axes, label="share of attention")
    figure.suptitle(_said(example), fontsize="medium", wrap=True)
    return figure


def draw_words(example: Example, where: str) -> "Figure | None":
    """Draw which patches of the first picture each word of the question reads, layer by layer.

    None: words read no patches there.

    Args:
        example: The question.
        where: In ``findings.PREFUSION`` or in the ``LANGUAGE`` model.
    """
    words = example.words[where][-MOST_WORDS:]
    if not words:
        return None
    canvas, layers = example.canvases[0], chosen_layers(words[0].maps.shape[1], MOST_WORD_LAYERS)
    figure = new_figure(1.35 * (len(words) + 1) + 0.8, 1.6 * len(layers) + 0.6)
    panels = figure.subplots(len(layers), len(words) + 1, squeeze=False)
    for row, layer in enumerate(layers):
        first, *others = panels[row]
        if row == 0:
            _show(first, canvas.picture, None, canvas.title)
        else:
            first.axis("off")
        first.text(-0.08, 0.5, f"layer {layer + 1}", transform=first.transAxes, rotation=90, ha="right", va="center")
        for axes, word in zip(others, words, strict=True):
            name = f"{_short(word.word)}\n" if row == 0 else ""
            _show(axes, canvas.picture, word.maps[0, layer], f"{name}{float(word.share[0, layer]):.0%}")
    return _captioned(figure, panels, example)


def draw_looks(examples: Sequence[Example]) -> "Figure | None":
    """Draw where compression queries look, for each question's first picture (Figure 12). None: none look."""
    looking = [(number, example.looks[0]) for number, example in enumerate(examples, 1) if example.looks]
    if not looking:
        return None
    queries = min(max(len(look.maps) for _, look in looking), MOST_QUERIES)
    across = min(MOST_COLUMNS // (queries + 1), len(looking))
    rows = -(-len(looking) // across)
    figure = new_figure(1.6 * across * (queries + 1) + 0.6, 1.85 * rows)
    panels = figure.subplots(rows, across * (queries + 1), squeeze=False)
    groups = panels.reshape(-1, queries + 1)  # of a question each
    for (number, look), (first, *others) in zip(looking, groups, strict=False):
        _show(first, look.picture, None, f"question {number}")
        for query, (axes, values) in enumerate(zip(others, look.maps, strict=False), 1):
            _show(axes, look.picture, values, f"query {query}")
    for axes in panels.flatten():
        if not axes.images:
            axes.axis("off")
    _scale(figure, panels)
    return figure


def _show(axes: "Axes", picture: np.ndarray, values: Tensor | None, title: str) -> None:
    """Show a picture, in grey below a map if there is one."""
    height, width = picture.shape[:2]
    extent: Any = (0, width, height, 0)
    if values is None:
        axes.imshow(picture, extent=extent)
    else:
        axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255, extent=extent)
        largest = float(values.max())
        axes.imshow(values.numpy(), cmap=_COLOURS, vmin=0, vmax=largest or 1, extent=extent, alpha=0.7)
    axes.set_title(title, fontsize="small")
    axes.set_xticks([])
    axes.set_yticks([])


def _captioned(figure: "Figure", panels: np.ndarray, example: Example) -> "Figure":
    figure.suptitle(_said(example), fontsize="medium", wrap=True)
    _scale(figure, panels)
    return figure


def _scale(figure: "Figure", panels: np.ndarray) -> None:
    """Say what the colours of all maps mean."""
    from matplotlib.cm import ScalarMappable

    shrink = min(1.0, 1.5 / len(panels))
    bar = figure.colorbar(
        ScalarMappable(cmap=_COLOURS), ax=panels.ravel().tolist(), aspect=14, shrink=shrink, anchor=(0, 1), pad=0.01
    )
    bar.set_ticks([0, 1], labels=["0", "most"], fontsize="small")


def _said(example: Example) -> str:
    return f"{_short(example.asked.question, 90)}   -   {_short(example.answer, 40) or '(nothing)'}"


def _short(text: str, most: int = 14) -> str:
    """Text on one line that no picture takes for a formula, cut."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    line = " ".join(line.split())
    return (line if len(line) <= most else f"{line[: most - 3]}...").replace("$", r"\$")
