"""Making the next step's batch while the present one is learned."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Calls a function of the step one step ahead, in a thread; what it returns does not change."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        """Wrap a function whose result depends on the step alone."""
        self.make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, and begin with the next one."""
        waiting = self._ahead.pop(step, None) or self._thread.submit(self.make, step)
        for other in self._ahead.values():
            other.cancel()
        batch = waiting.result()
        self._ahead = {step + 1: self._thread.submit(self.make, step + 1)}
        return batch
