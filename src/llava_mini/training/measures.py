"""What a step makes small, what each process measures of it, and how far a phase is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llava_mini.data.quarantine import Damaged
from llava_mini.training.checkpoints import Facts


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a step has to make small."""

    total: Tensor
    """Scalar, with gradients."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named losses for the log."""
    right: dict[str, float] = field(default_factory=dict)
    """Named shares of right answers for the log, 0 to 1."""


@dataclass(frozen=True)
class Share:
    """What one process brings to a step, known before anything is computed."""

    weight: float
    ids: tuple[str, ...]
    damaged: tuple[Damaged, ...]


@dataclass
class Measured:
    """What one process found in a step: weighted sums over its micro-batches, each with its sum of weights."""

    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    right: dict[str, tuple[float, float]] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    """Samples of micro-batches whose loss is not finite."""
    ends: bool = False
    """Whether this process has to end after the step."""
    saves: bool = False
    """Whether it is time for a checkpoint."""

    def add(self, losses: Losses, total: float, weight: float) -> None:
        """Add a micro-batch."""
        for sums, values in ((self.losses, {"loss": total, **losses.parts}), (self.right, losses.right)):
            for name, value in values.items():
                before, weights = sums.get(name, (0.0, 0.0))
                sums[name] = (before + value * weight, weights + weight) if weight else (before, weights)


@dataclass
class Position:
    """How far a phase is, and what was measured since the last line of the log."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time they took, over all starts; steps that were lost and run again are counted once."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sum and number of each measured value."""
    sums_right: dict[str, list[float]] = field(default_factory=dict)
    saving_seconds: float = 1.0
    """What the last checkpoint took to write."""

    def advance(self, values: Mapping[str, float], right: Mapping[str, float], seconds: float) -> None:
        """Count a step, after so many seconds in all, and what was measured in it."""
        self.step += 1
        self.seconds = seconds
        for sums, measured in ((self.sums, values), (self.sums_right, right)):
            for name, value in measured.items():
                before, number = sums.get(name, (0.0, 0))
                sums[name] = [before + value, number + 1]

    @classmethod
    def from_facts(cls, facts: Facts) -> "Position":
        """Return what ``to_facts`` described."""
        return cls(**{name: facts[name] for name in ("step", "seconds", "sums", "sums_right")})

    def to_facts(self) -> dict[str, Any]:
        """Return all of it for JSON, besides the time of saving."""
        return {"step": self.step, "seconds": self.seconds, "sums": self.sums, "sums_right": self.sums_right}

    def take_means(self) -> dict[str, Any]:
        """Return the means of what was measured, those of right answers under ``right``, and begin anew."""
        means, right = (
            {name: total / number for name, (total, number) in sums.items()} for sums in (self.sums, self.sums_right)
        )
        self.sums, self.sums_right = {}, {}
        return {**means, "right": right} if right else means


def means(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Return the mean of each name over the sums and weights of all processes."""
    sums: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            before, weights = sums.get(name, (0.0, 0.0))
            sums[name] = before + value, weights + weight
    return {name: value / weight for name, (value, weight) in sums.items() if weight}
