"""What a run leaves behind and shows: a line of JSON per logged step, and progress on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from llava_mini.training.trackers import Tracker

Progress = Callable[[int, float, Mapping[str, float]], None]
"""Called after each step with the steps done, the seconds they took, and what was measured."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much one phase has to do, for the time that is left."""

    name: str
    num_steps: int
    step_cost: float = 1.0
    """Time of a step against a step of the other phases."""


class RunLog:
    """Writes measurements to ``log.jsonl`` in the folder of a run, and progress to the terminal.

    On a terminal progress is a bar; elsewhere it is a plain line now and then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        terminal: TextIO | None = None,
        every_seconds: float = 30.0,
        phases: Sequence[Work] = (),
        tracker: Tracker | None = None,
        silent: bool = False,
    ) -> None:
        """Open the log for appending.

        Args:
            folder: Folder of the run; made if missing.
            terminal: Where progress goes; standard error when not given.
            every_seconds: Least time between two plain lines.
            phases: All that the run does, in order; empty leaves out the time left for the run.
            tracker: Is told the same, besides the file.
            silent: Write and show nothing, as all processes of a run but the first do.
        """
        self.path = folder / "log.jsonl"
        if not silent:
            folder.mkdir(parents=True, exist_ok=True)
            _end_last_line(self.path)
        self.tracker = tracker
        self.silent = silent
        self.terminal = terminal or sys.stderr
        self.every_seconds = every_seconds
        self.phases = phases
        self._spent: dict[str, tuple[int, float]] = {}
        self._warnings: list[str] = []
        self._bar: tqdm[NoReturn] | None = None

    def write(self, **facts: float | int | str | Mapping[str, float]) -> None:
        """Append one line of JSON, in the file when this returns, and tell the tracker."""
        if self.silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")
        if self.tracker is not None:
            self.tracker.write(facts)

    def say(self, text: str) -> None:
        """Show a line on the terminal."""
        if self.silent:
            return
        tqdm.write(text, file=self.terminal)
        self.terminal.flush()

    def warn(self, text: str) -> None:
        """Show a warning, unless it was shown before."""
        if text not in self._warnings:
            self._warnings.append(text)
            self.say(f"warning: {text}")

    @contextmanager
    def phase(self, name: str, step: int, num_steps: int) -> Iterator["Progress"]:
        """Give what shows the progress of a phase.

        Args:
            name: Of the phase.
            step: Steps done before.
            num_steps: Of the phase.
        """
        if self.terminal.isatty() and not self.silent:
            self._bar = tqdm(
                total=num_steps,
                initial=step,
                desc=name,
                file=self.terminal,
                dynamic_ncols=_tells_its_width(self.terminal),
                ncols=80,  # for a terminal that does not
                bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}{postfix}",
            )
        shown_at = -math.inf

        def show(step: int, seconds: float, values: Mapping[str, float]) -> None:
            nonlocal shown_at
            self.spent(name, step, seconds)
            if self._bar is not None:
                self._bar.update(step - self._bar.n)
            every = self.every_seconds if self._bar is None else 1.0
            if step < num_steps and time.monotonic() - shown_at < every:
                return
            shown_at = time.monotonic()
            left = f"{time_in_words((num_steps - step) * seconds / step)} left"
            if len(self.phases) > 1:
                left += f" (run {time_in_words(self.seconds_left())})"
            told = ", ".join([left, *(f"{name} {value:.3f}" for name, value in values.items())])
            if self._bar is not None:
                self._bar.set_postfix_str(told)
            else:
                self.say(f"{name}: step {step}/{num_steps}, {told}")

        try:
            yield show
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def spent(self, phase: str, step: int, seconds: float) -> None:
        """Take note that the first steps of a phase have taken so long."""
        self._spent[phase] = step, seconds

    def seconds_left(self) -> float:
        """Return about how long the phases will still take, judged by what their steps have taken; 0 before any."""
        costs = {phase.name: phase.step_cost for phase in self.phases}
        done = sum(step * costs.get(name, 1.0) for name, (step, _) in self._spent.items())
        overall = sum(seconds for _, seconds in self._spent.values()) / done if done else 0.0
        left = 0.0
        for phase in self.phases:
            step, seconds = self._spent.get(phase.name, (0, 0.0))
            left += (phase.num_steps - step) * (seconds / step if step else overall * phase.step_cost)
        return left


def time_in_words(seconds: float) -> str:
    """Return a duration as ``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, in the order of their first appearance, one for each step of each phase.

    Steps that were run again after a kill are written twice; the later line counts. A line cut off by a kill is
    left out. A missing file has no lines.
    """
    if not path.exists():
        return []
    lines: dict[tuple[object, object], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[line.get("phase"), line.get("step")] = line
    return list(lines.values())


def _end_last_line(path: Path) -> None:
    """Let the next line begin a line, where a kill or a full disk cut off the last one."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def _tells_its_width(terminal: TextIO) -> bool:
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):
        return False
