"""Times of things that take turns, with the device drained around each of them, and the parts of an answer.

Machines grow warm, slow down and are disturbed, so what is compared takes turns in one run: each round
measures every thing once, and a disturbance meets all of them.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

Part = Literal["vision", "reduction", "pre-fusion", "prefill"]
PARTS: tuple[Part, ...] = ("vision", "reduction", "pre-fusion", "prefill")
"""Parts of the way to an answer's first token, in their order."""

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Laps:
    """Seconds of each part of one answer. Draining the device after each part costs time, so it can be left out."""

    device: torch.device
    by_part: bool
    """False: nothing is drained and nothing counted between start and end."""
    seconds: dict[Part, float] = field(default_factory=dict)
    _since: float = 0.0

    def start(self) -> None:
        """Begin the first part."""
        self._since = drained(self.device)

    def __call__(self, part: Part) -> None:
        """End ``part`` here and begin the next one."""
        if self.by_part:
            now = drained(self.device)
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
            self._since = now


def drained(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device has done its work."""
    since = drained(device)
    call()
    return drained(device) - since


def take_turns(calls: Mapping[Name, Callable[[], Result]], *, warmup: int, repeats: int) -> dict[Name, list[Result]]:
    """Call all things ``warmup + repeats`` times in turns, and keep what the last ``repeats`` calls gave.

    A thing that runs out of the device's memory is called no more; it keeps what it gave until then.
    """
    found: dict[Name, list[Result]] = {name: [] for name in calls}
    left = dict(calls)
    for turn in range(warmup + repeats):
        for name, call in list(left.items()):
            try:
                result = call()
            except torch.OutOfMemoryError:
                del left[name]
                torch.cuda.empty_cache()
                continue
            if turn >= warmup:
                found[name].append(result)
    return found
