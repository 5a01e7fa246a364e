"""Samples that cannot be learned: left out of their batch, written down with the reason, and counted.

Nothing takes the place of what is left out: no black picture, no other sample.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

_FIRST_SAMPLES = 1000
"""The share is taken of at least so many samples: one bad file among the first ten does not end a run."""
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A sample that was left out."""

    id: str
    """Of the sample."""
    media: str
    """The file at fault, in words. Empty: it is not a file but the record."""
    reason: str
    """One sentence."""

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.id}: {self.reason}"


class QuarantineLog:
    """Counts what was left out, writes it to a file of JSON lines, and knows when it is too much.

    A sample stands in the file once, however often it comes up and however often the run is started again.
    """

    def __init__(self, path: Path | None, *, max_share: float, num_samples: int = 0, num_damaged: int = 0) -> None:
        """Make a log, or go on with the file of an earlier start.

        Args:
            path: The file; it is made with the first damaged sample. None: count only, as all ranks but one do.
            max_share: Largest share of damaged samples, 0 to 1.
            num_samples: Samples counted by earlier starts, the damaged ones included.
            num_damaged: Damaged samples counted by earlier starts.

        Raises:
            ValueError: ``max_share`` is not within 0 and 1, or the file holds something else.
        """
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_damaged_share is {max_share}; it must lie within 0 (none) and 1 (all).")
        self.path = path
        self.max_share = max_share
        self.num_samples = num_samples
        self.num_damaged = num_damaged
        self._examples: list[Damaged] = []
        self._written: set[str] = set()
        if path is not None and path.exists():
            self._written = {one.id for one in read_quarantine(path)}
            _drop_unfinished_line(path)

    def add(self, damaged: Iterable[Damaged], *, num_samples: int) -> None:
        """Count some samples, and write down the damaged ones among them that are not in the file yet.

        Args:
            damaged: Those that were left out.
            num_samples: How many samples there were, the damaged ones included.
        """
        damaged = list(damaged)
        self.num_samples += num_samples
        self.num_damaged += len(damaged)
        self._examples = (self._examples + damaged)[:_EXAMPLES]
        new = {one.id: one for one in damaged if one.id not in self._written}
        if not new:
            return
        self._written |= set(new)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(new.values()))

    def check(self) -> None:
        """Refuse to go on when too many samples are damaged.

        Raises:
            ValueError: More than ``max_share`` of the samples, counted as at least 1000; the message names some.
        """
        if self.num_damaged <= self.max_share * max(self.num_samples, _FIRST_SAMPLES):
            return
        where = "" if self.path is None else f" {self.path} lists all of them."
        raise ValueError(
            f"{self.num_damaged} of {self.num_samples} samples are damaged, more than the share of {self.max_share:g} "
            f"that is allowed.{where} The first: {' | '.join(map(str, self._examples))} Is the folder of the media "
            "right, and are they complete? Mend the data, or raise max_damaged_share."
        )


def write_quarantine(path: Path, damaged: Iterable[Damaged]) -> None:
    """Write what was left out as a ``QuarantineLog`` does; the file appears when it is complete.

    A list that is there is replaced: what was mended since is not on it.
    """
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(_lines(damaged), encoding="utf-8")
    draft.replace(path)


def _lines(damaged: Iterable[Damaged]) -> str:
    return "".join(f"{json.dumps(asdict(one))}\n" for one in damaged)


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what a kill left of a line, so that the next one begins a line."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def read_quarantine(path: Path) -> list[Damaged]:
    """Read the file of a ``QuarantineLog``. A last line that was cut off by a kill is left out.

    Raises:
        ValueError: A line is something else.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(Damaged(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is no line of a quarantine list ({error}). Move the file away."
            ) from error
    return found
