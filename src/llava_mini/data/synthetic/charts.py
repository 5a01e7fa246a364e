"""Small bar charts: what one shows, and the questions about it. Pixels are made in ``drawing``."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.phrasings import Split, phrased

MAX_VALUE = 9
"""Bars have whole values from 1 to this."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar, with its value written above it."""

    colour: str
    """One of ``COLOURS``."""
    value: int
    left: int
    """Left edge, in world units."""
    width: int
    """In world units."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Bars side by side on a common ground line. The colours of the bars differ."""

    bars: tuple[Bar, ...]
    """From left to right."""
    ground: int
    """y of the ground line, in world units."""
    unit: int
    """Height of a value of 1, in world units."""
    plate: int
    """Grey level of the board behind the bars."""
    font: str
    """One of ``FONTS``."""
    digit_size: int
    """Size of the font, in world units."""

    @property
    def ink(self) -> int:
        """Grey level of the digits and the ground line."""
        return 20 if self.plate > 127 else 235

    def describe(self) -> str:
        """Return the chart in words: ``a bar chart with red 3 and blue 5``."""
        parts = [f"{bar.colour} {bar.value}" for bar in self.bars]
        return "a bar chart with " + (", ".join(parts[:-1]) + " and " + parts[-1])


def random_chart(rng: random.Random, colours: tuple[str, ...], fonts: tuple[str, ...]) -> Chart:
    """Draw a chart of two to five bars, with one tallest and one shortest bar.

    Args:
        rng: Where the random numbers come from.
        colours: Of the bars.
        fonts: Of the digits.
    """
    count = rng.randint(2, 5)
    values = [rng.randint(1, MAX_VALUE) for _ in range(count)]
    while values.count(max(values)) > 1 or values.count(min(values)) > 1:
        values = [rng.randint(1, MAX_VALUE) for _ in range(count)]
    board = rng.choice((rng.randint(195, 235), rng.randint(60, 85)))
    step = 84 // count
    width = max(rng.randint(step // 2, step - 3), 10)
    start = 6 + rng.randint(0, 84 - step * count + step - width)
    bars = tuple(
        Bar(colour=colour, value=value, left=start + step * place, width=width)
        for place, (colour, value) in enumerate(zip(rng.sample(colours, count), values, strict=True))
    )
    return Chart(
        bars=bars,
        ground=rng.randint(84, 90),
        unit=rng.randint(5, 6),
        plate=board,
        font=rng.choice(fonts),
        digit_size=rng.randint(13, 16),
    )


def ask_about_chart(rng: random.Random, chart: Chart, split: Split) -> Turn:
    """Ask which bar is the tallest or the shortest, how tall one is, how many there are, or which of two is taller."""
    return rng.choice((_extreme, _extreme, _value, _value, _number, _taller))(rng, chart, split)


def _extreme(rng: random.Random, chart: Chart, split: Split) -> Turn:
    form: str = rng.choice(("tallest bar", "shortest bar"))
    best: Callable[..., Bar] = max if form == "tallest bar" else min
    answer = best(chart.bars, key=lambda bar: bar.value).colour
    return phrased(rng, split, form).turn(answer, kind="chart")


def _value(rng: random.Random, chart: Chart, split: Split) -> Turn:
    bar = rng.choice(chart.bars)
    return phrased(rng, split, "value of a bar", a=bar.colour).turn(str(bar.value), kind="chart")


def _number(rng: random.Random, chart: Chart, split: Split) -> Turn:
    return phrased(rng, split, "how many bars").turn(str(len(chart.bars)), kind="chart")


def _taller(rng: random.Random, chart: Chart, split: Split) -> Turn:
    first, second = rng.sample(chart.bars, 2)
    if first.value == second.value:
        return _extreme(rng, chart, split)
    answer = "yes" if first.value > second.value else "no"
    return phrased(rng, split, "is a bar taller", a=first.colour, b=second.colour).turn(answer, kind="chart")
