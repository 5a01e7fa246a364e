"""Ending a run early without loss: after Ctrl-C or SIGTERM, or when its time is up."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Tells a run when to end.

    As a context manager it takes over Ctrl-C and SIGTERM, in the main thread. Inside ``deferred`` a signal waits for
    the run to ask ``is_due``; elsewhere, or when it comes a second time, it ends the program at once.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        """Start the clock.

        Args:
            seconds: After which the time is up.
        """
        self.ends_at = time.monotonic() + seconds
        self.received: list[int] = []
        """Numbers of the signals that came."""
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait inside the block. One that still waits at its end is acted on there."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.obey()

    def is_due(self, needed_seconds: float = 0.0) -> bool:
        """Return whether a signal came, or less than so many seconds are left."""
        return bool(self.received) or self.seconds_left() < needed_seconds

    def seconds_left(self) -> float:
        """Return the time until the end; negative after it."""
        return self.ends_at - time.monotonic()

    def obey(self) -> None:
        """End the program if a signal came: with 130 after Ctrl-C, 143 after SIGTERM.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After SIGTERM.
        """
        if not self.received:
            return
        if self.received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.received[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if not self._deferring or len(self.received) > 1:
            self.obey()
