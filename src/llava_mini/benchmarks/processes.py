"""Python processes that start from nothing, for what can only be measured once in a process."""

import ctypes
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).parents[2]

_PR_SET_PDEATHSIG = 1
"""From Linux's sys/prctl.h."""


class ProcessError(ValueError):
    """A process ended with an error."""

    def __init__(self, code: int, told: str) -> None:
        last = next(iter(told.strip().splitlines()[::-1]), "it told nothing")
        super().__init__(f"a process of its own ended with {code}: {last}")
        self.told = told
        """All that it wrote to stderr."""


def fresh(program: str, *arguments: str, timeout: float | None = None) -> tuple[str, float]:
    """Run a program in a process of its own that finds this package.

    Args:
        program: Python code; ``sys.argv[1:]`` are the arguments.
        arguments: for it.
        timeout: seconds after which it is killed. None: never.

    Returns:
        What it printed, and the seconds from its start to its end.

    Raises:
        ProcessError: it failed; the message ends with what it told last.
        subprocess.TimeoutExpired: it was killed.
    """
    found = f"import sys; sys.path.insert(0, {str(_SOURCE)!r})\n{program}"
    since = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", found, *arguments], capture_output=True, text=True, check=False, timeout=timeout
    )
    seconds = time.perf_counter() - since
    if done.returncode != 0:
        raise ProcessError(done.returncode, done.stderr)
    return done.stdout, seconds


def fresh_result(program: str, *arguments: str, timeout: float | None = None) -> tuple[Any, float]:
    """As ``fresh``, with the last line that was printed read as JSON."""
    printed, seconds = fresh(program, *arguments, timeout=timeout)
    return json.loads(printed.strip().splitlines()[-1]), seconds


def end_with_parent() -> None:
    """Let the system end this process when the one that started it ends, however that does; only Linux can.

    What a benchmark leaves behind when it is stopped would hold memory and time of the next one.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
