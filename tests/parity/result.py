"""What a parity check found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One line of the parity table."""

    name: str
    """Which stored number."""
    error: float
    """Largest difference to it; for ids and text, how many differ."""
    tolerance: float
    """Above it, the check fails."""
    note: str = ""
    """What differs and why, or which mended defect makes ours differ."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance
