"""A picture of a run: losses and shares of right answers over the steps, one panel for each phase."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini.training.checkpoints import replaced

UNPLOTTED = ("time", "phase", "step", "rate_share", "gradient_norm", "seconds", "right", "damaged")
"""Entries of a line of the log that are no losses."""


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lines of a log as a PNG file, which is never half there.

    Losses are solid lines on a logarithmic axis at the left; shares of right answers are dashed, on an axis from 0
    to 1 at the right.

    Args:
        lines: From ``read_log``; none draw nothing.
        path: Of the file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Curves are drawn with matplotlib, which is not installed. Install llava-mini[train]."
        ) from error
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    if not phases:
        return
    figure = Figure(figsize=(4.5 * len(phases), 3.6), layout="constrained")
    for panel, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        of_phase = [line for line in lines if line["phase"] == phase]
        losses = [{name: value for name, value in line.items() if name not in UNPLOTTED} for line in of_phase]
        rights = [line.get("right", {}) for line in of_phase]
        steps = [line["step"] for line in of_phase]
        marker = "." if len(steps) == 1 else ""  # one point alone is no line
        colours = iter(f"C{number}" for number in range(100))
        panel.set_title(phase)
        panel.set_xlabel("step")
        panel.set_yscale("log")
        handles = [
            panel.plot(*_series(steps, losses, name), marker=marker, color=next(colours), label=name)[0]
            for name in _names(losses)
        ]
        if any(rights):
            other = panel.twinx()
            other.set_ylim(0, 1.02)
            handles += [
                other.plot(
                    *_series(steps, rights, name), "--", marker=marker, color=next(colours), label=f"{name} right"
                )[0]
                for name in _names(rights)
            ]
        panel.legend(handles=handles, fontsize="x-small", loc="center right")
    with replaced(path) as draft:
        figure.savefig(draft, format="png", dpi=110)


def _names(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _series(steps: Sequence[int], rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(step, row[name]) for step, row in zip(steps, rows, strict=True) if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]
