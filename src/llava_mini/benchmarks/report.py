"""What every benchmark gives: tables for people, then one line of JSON for programs."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_mini.training.checkpoints import write_text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Some rows of words and numbers under a title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    """As many words a row as there are columns."""
    left: tuple[str, ...] = ()
    """Columns that are set on the left; the first one always is."""

    def markdown(self) -> str:
        """The table for a page, without its title."""
        aligned = ["---" if index == 0 or name in self.left else "---:" for index, name in enumerate(self.columns)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, aligned, *self.rows))

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.columns))]
        is_left = [index == 0 or name in self.left for index, name in enumerate(self.columns)]
        texts = [
            "  ".join(
                word.ljust(width) if left else word.rjust(width)
                for word, width, left in zip(line, widths, is_left, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *texts])


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark found."""

    bench: str
    """Its name."""
    environment: Mapping[str, object]
    """Device, versions and commit, from ``evaluation.environment``."""
    settings: Mapping[str, object]
    """What was asked for, choices that were left open filled in."""
    results: Mapping[str, Any]
    """All numbers: every time, not only medians."""
    tables: Sequence[Table]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def line(self) -> str:
        """The line of JSON."""
        return json.dumps(
            {
                "bench": self.bench,
                "environment": dict(self.environment),
                "settings": dict(self.settings),
                "results": dict(self.results),
            }
        )

    def write(self, path: Path) -> None:
        """Write the line into a file, whose folder exists: wholly or not at all."""
        write_text(path, self.line() + "\n")


def tupled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were read from JSON, which has lists where they have tuples."""
    return {name: tuple(one) if isinstance(one, list) else one for name, one in given.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of some values; of a single one, three times itself.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("There is nothing to take a median of: no value was measured.")
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "first_quartile": first, "third_quartile": third}


def told(values: Sequence[float], digits: int = 2) -> str:
    """Median and quartiles in words: ``3.10 (3.05-3.20)``; a dash where nothing was measured."""
    if not values:
        return "-"
    found = spread(values)
    return f"{found['median']:.{digits}f} ({found['first_quartile']:.{digits}f}-{found['third_quartile']:.{digits}f})"


def scaled(number: float, unit: str) -> str:
    """A number with its prefix: ``1.96 TFLOP``, ``9.45 MB``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"
