"""Lines over layers, as pictures. Colours are those of Okabe and Ito, and each line has a marker of its own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from llava_mini.analysis.attention_stats import PARTS, TYPES, Spread
from llava_mini.analysis.drop_layers import Dropped, by_medium
from llava_mini.analysis.findings import Averages
from llava_mini.analysis.fusion import SOURCES, TEXTS
from llava_mini.analysis.pointing import LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STYLES = {
    "instruction": ("#0072B2", "o", "-"),
    "vision": ("#D55E00", "s", "-"),
    "response": ("#009E73", "^", "-"),
    "first token": ("#56B4E9", "", "--"),
    "patches": ("#D55E00", "s", "-"),
    "compressed": ("#CC79A7", "D", "-"),
    "text": ("#0072B2", "o", "-"),
    **dict(zip(LINES, (("#D55E00", "s", "-"), ("#0072B2", "o", "-"), ("#555555", "", ":")), strict=True)),
}
"""Colour, marker and line of what is attended to."""

_NAMES = {
    "first token": "the first token alone (in instruction)",
    "compressed": "compressed tokens",
    "text": "text so far",
    "before the image": "text before the image",
    "after the image": "text after the image",
}
"""What is called otherwise in pictures."""

_UNITS = {"entropy": "entropy in nats", "evenness": "entropy, share of the largest"}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty picture of so many inches.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "Pictures are drawn with matplotlib, which is not installed. Install llava-mini[train]."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_attention(averages: Averages) -> "Figure":
    """Draw what each type of token attends to, by layer (Figure 2)."""
    figure = _panels(averages.share, TYPES, (*TYPES, "first token"), (PARTS, PARTS), "share of attention")
    return _as_shares(figure)


def draw_entropy(spread: Spread, kind: Literal["entropy", "evenness"]) -> "Figure":
    """Draw how evenly the tokens of each type are attended to, by layer (Figure 3)."""
    figure = _panels(spread, TYPES, TYPES, (PARTS, PARTS), _UNITS[kind])
    return _as_shares(figure) if kind == "evenness" else figure


def draw_fusion(averages: Averages) -> "Figure":
    """Draw what the text attends to in pre-fusion, by layer."""
    return _as_shares(_panels(averages.share, TEXTS, SOURCES, (TEXTS, SOURCES), "share of attention"))


def draw_dropped(ways: Sequence[Dropped]) -> "Figure":
    """Draw how right answers are with vision tokens dropped in ranges of layers (Figure 5).

    Args:
        ways: All of ``drop_layers.drop_ranges``, with marks.
    """
    groups, num_ranges = by_medium(ways), sum(way.series == "in a range" for way in ways)
    figure = new_figure((0.8 + max(3.4, 0.65 * num_ranges)) * max(len(groups), 1.4), 3.8)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        ranges = [way for way in group if way.series == "in a range"]
        onwards = [way for way in group if way.series in ("everywhere", "from a layer on")]
        _marks(axes, ranges, -0.06, "#0072B2", "o", "dropped in these layers")
        _marks(axes, onwards, 0.06, "#D55E00", "s", "dropped in these and all later layers")
        nowhere = next(way for way in group if way.series == "nowhere")
        axes.axhline(nowhere.right, color="#009E73", linestyle="--", label="dropped nowhere")
        if nowhere.guess is not None:
            axes.axhline(nowhere.guess, color="#555555", linestyle=":", label="blind guess")
        axes.set_xticks(range(len(ranges)), [way.layers for way in ranges])
        axes.set_xlabel("layers")
        asked = len(nowhere.marks)
        axes.set_title(f"{asked} question{'s' * (asked > 1)} about {name}", fontsize="medium")
    panels[0].set_ylabel("share of right answers")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    return _as_shares(figure)


def draw_pointing(spreads: Mapping[str, Spread]) -> "Figure":
    """Draw how much of a word's attention to the patches goes to the thing that it names, by layer."""
    figure = new_figure(1.2 + 3.4 * max(len(spreads), 1.4), 3.6)
    panels = figure.subplots(1, len(spreads), sharey=True, squeeze=False)[0]
    for axes, (where, spread) in zip(panels, spreads.items(), strict=True):
        for number, name in enumerate(LINES):
            _line(axes, spread.mean[:, 0, number], spread.error[:, 0, number], name)
        axes.set_title(f"{where}, {int(spread.count.max())} names", fontsize="medium")
        axes.set_xlabel("layer")
        axes.set_xticks(_ticks(len(spread.mean)))
    panels[0].set_ylabel("share of attention to patches")
    handles = panels[0].get_lines()
    figure.legend(handles, LINES, loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    return _as_shares(figure)


def _marks(axes: "Axes", ways: Sequence[Dropped], offset: float, colour: str, marker: str, label: str) -> None:
    right = [way.right for way in ways]
    below = [max(way.right - way.interval[0], 0) for way in ways]
    above = [max(way.interval[1] - way.right, 0) for way in ways]
    places = [place + offset for place in range(len(ways))]
    axes.errorbar(places, right, yerr=[below, above], color=colour, marker=marker, capsize=3, label=label)


def _panels(
    spread: Spread,
    sources: Sequence[str],
    targets: Sequence[str],
    names: tuple[Sequence[str], Sequence[str]],
    unit: str,
) -> "Figure":
    """One panel for each type that attends, one line for each that is attended to; mean and its 95 % interval."""
    rows, columns = names
    shown = [source for source in sources if spread.count[:, rows.index(source)].any()]
    figure = new_figure(1.2 + 3.1 * len(shown), 3.6)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    lines: dict[str, Line2D] = {}
    for axes, source in zip(panels, shown, strict=True):
        for target in targets:
            pair = (slice(None), rows.index(source), columns.index(target))
            if spread.mean[pair].nan_to_num().any():  # what comes later is never seen
                lines[_NAMES.get(target, target)] = _line(axes, spread.mean[pair], spread.error[pair], target)
        axes.set_title(f"from {_NAMES.get(source, source)}", fontsize="medium")
        axes.set_xlabel("layer")
        axes.set_xticks(_ticks(len(spread.mean)))
    panels[0].set_ylabel(unit)
    labels = [f"to {name}" for name in lines]
    figure.legend(list(lines.values()), labels, loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    return figure


def _line(axes: "Axes", mean: Tensor, error: Tensor, target: str) -> "Line2D":
    colour, marker, line = STYLES[target]
    layers, error = list(range(1, len(mean) + 1)), error.nan_to_num(0)
    axes.fill_between(layers, (mean - error).tolist(), (mean + error).tolist(), color=colour, alpha=0.18, linewidth=0)
    return axes.plot(layers, mean.tolist(), color=colour, marker=marker, linestyle=line, markersize=4)[0]


def _as_shares(figure: "Figure") -> "Figure":
    """Give all panels the scale from 0 to 1."""
    for axes in figure.axes:
        axes.set_ylim(-0.02, 1.02)
    return figure


def _ticks(num_layers: int) -> list[int]:
    """Layers to be named: all of a few, every fourth of many."""
    return list(range(1, num_layers + 1)) if num_layers <= 12 else [1, *range(4, num_layers + 1, 4)]
