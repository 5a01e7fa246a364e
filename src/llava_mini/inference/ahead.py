"""An iterator that works ahead in a thread of its own."""

from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")

_LOOK_SECONDS = 0.1
"""How often a thread that waits for room looks whether anybody still wants its items."""


class Ahead(Iterator[Item], Generic[Item]):
    """The items of an iterator, made ``depth`` ahead while the last one is worked on.

    Errors of the iterator come in their place. ``close`` ends the thread after the item it is making.
    """

    def __init__(self, items: Iterator[Item], depth: int = 1) -> None:
        """Prepare; the thread starts with the first item that is asked for.

        Args:
            items: Read in the thread alone, and closed there if it can be.
            depth: How many finished items wait at most.
        """
        self._items = items
        self._ready: Queue[tuple[Item | None, BaseException | None]] = Queue(depth)
        self._unwanted = Event()
        self._thread = Thread(target=self._work, name="llava-mini media", daemon=True)
        self._ended = False

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        item, error = self._ready.get()
        if error is None:
            return item  # pyright: ignore[reportReturnType]  # without an error there is one
        self._ended = True
        raise error

    def close(self) -> None:
        """Make nothing more, and wait for the thread to end."""
        self._ended = True
        self._unwanted.set()
        with suppress(Empty):
            while True:
                self._ready.get_nowait()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._hand_over((item, None)):
                    return
            self._hand_over((None, StopIteration()))
        except BaseException as error:
            self._hand_over((None, error))
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _hand_over(self, result: tuple[Item | None, BaseException | None]) -> bool:
        """Wait for room; False if nobody wants the result any more."""
        while not self._unwanted.is_set():
            with suppress(Full):
                self._ready.put(result, timeout=_LOOK_SECONDS)
                return not self._unwanted.is_set()
        return False
