"""What a run leaves behind: a line of JSON per logged step, and a line on the terminal."""

import json
import sys
import time
from pathlib import Path
from typing import TextIO


class RunLog:
    """Writes measurements to ``log.jsonl`` in the folder of a run, and progress to the terminal."""

    def __init__(self, folder: Path, *, terminal: TextIO | None = None, every_seconds: float = 5.0) -> None:
        """Open the log for appending.

        Args:
            folder: Folder of the run; made if missing.
            terminal: Where progress goes; standard error when not given.
            every_seconds: Least time between two progress lines.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.terminal = terminal or sys.stderr
        self.every_seconds = every_seconds
        self._shown_at = 0.0

    def write(self, **facts: float | int | str) -> None:
        """Append one line of JSON, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")

    def say(self, text: str) -> None:
        """Show a line on the terminal."""
        print(text, file=self.terminal, flush=True)

    def progress(
        self, phase: str, step: int, num_steps: int, seconds_per_step: float, losses: dict[str, float]
    ) -> None:
        """Show how far a phase is and how long it will take, unless a line was shown just before."""
        now = time.monotonic()
        if step < num_steps and now - self._shown_at < self.every_seconds:
            return
        self._shown_at = now
        left = time_in_words((num_steps - step) * seconds_per_step)
        values = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.say(f"{phase}: step {step}/{num_steps}, {left} left, {values}")


def time_in_words(seconds: float) -> str:
    """Return a duration as ``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def read_log(path: Path) -> list[dict[str, float | int | str]]:
    """Return the lines of a log. A last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
