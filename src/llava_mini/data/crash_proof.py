"""Work on many numbered things in processes, of which one may die at a damaged file: it is told, and the rest goes on.

What decodes pictures and films is written in C: a damaged file can end the process that reads it, and so can the system
when memory is short. Processes started here end when this one does, however that comes about, and never get its Ctrl-C.
"""

import json
import os
import pickle
import selectors
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar, cast

Result = TypeVar("Result")

_DEATHS_IN_A_ROW = 3
"""After as many without a result between them, it is not the files."""


@dataclass(frozen=True, kw_only=True)
class Died:
    """In place of a result: the process that worked on it has ended."""

    code: int
    """Its exit code, or minus the number of the signal that ended it."""


def results(
    make: Callable[[int], Result], count: int, *, processes: int
) -> Generator[tuple[int, Result | Died], None, None]:
    """Call a function with 0, 1, ... in processes and yield what it returns with its number, as it comes.

    Args:
        make: Is pickled, and so are its results.
        count: How many numbers there are.
        processes: How many processes work at a time. 1: this one, which dies with the function.

    Raises:
        ChildProcessError: A process does not start, or several died in a row.
        RuntimeError: The function raised an error; the message holds its traceback.
    """
    if processes == 1:
        yield from ((number, make(number)) for number in range(count))
        return
    program = pickle.dumps(make)
    numbers = iter(range(count))
    with selectors.DefaultSelector() as selector:
        workers: set[_Worker[Result]] = set()

        def begin(worker: "_Worker[Result]") -> None:
            """Give a worker its next number, or let it go."""
            worker.number = next(numbers, None)
            if worker.number is None:
                worker.close()
                workers.discard(worker)
            else:
                worker.send(worker.number)
                selector.register(worker.answers, selectors.EVENT_READ, worker)

        try:
            for _ in range(min(processes, count)):
                workers.add(_Worker(program))
            for worker in list(workers):
                worker.wait_until_ready()
                begin(worker)
            deaths = 0
            while selector.get_map():
                for key, _ in selector.select():
                    worker = cast("_Worker[Result]", key.data)
                    selector.unregister(worker.answers)
                    number = cast(int, worker.number)
                    try:
                        result, deaths = worker.receive(), 0
                    except EOFError:
                        deaths += 1
                        result = Died(code=worker.process.wait())
                        if deaths == _DEATHS_IN_A_ROW:
                            raise ChildProcessError(worker.last_words(f"{deaths} processes in a row died")) from None
                        workers.discard(worker)
                        worker = worker.replaced()
                        workers.add(worker)
                        worker.wait_until_ready()
                    yield number, result
                    begin(worker)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.close()


class _Worker(Generic[Result]):
    """A process that answers one number at a time."""

    def __init__(self, program: bytes) -> None:
        self._program = program
        self._told: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        start = f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        self.number: int | None = None
        self.answers = cast(IO[bytes], self.process.stdout)

    def replaced(self) -> "_Worker[Result]":
        """Return a new process for one that has died."""
        self.close()
        return _Worker(self._program)

    def wait_until_ready(self) -> None:
        """Say what is to be called, and wait until it can be. All start before this is asked of the first."""
        with suppress(OSError):  # it has died: told below
            stdin = cast(IO[bytes], self.process.stdin)
            stdin.write(self._program)
            stdin.flush()
        try:
            pickle.load(self.answers)
        except EOFError:
            self.process.wait()
            raise ChildProcessError(self.last_words("A process that reads data did not start")) from None

    def send(self, number: int) -> None:
        with suppress(OSError):  # it has died: told by receive
            stdin = cast(IO[bytes], self.process.stdin)
            pickle.dump(number, stdin)
            stdin.flush()

    def receive(self) -> Result:
        """Return the answer.

        Raises:
            EOFError: The process has died.
        """
        try:
            is_made, value = pickle.load(self.answers)
        except pickle.UnpicklingError as error:
            raise EOFError from error
        if not is_made:
            raise RuntimeError(value)
        return value

    def last_words(self, what: str) -> str:
        """Return what it told last, and what to do."""
        self._told.seek(0)
        lines = self._told.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it told nothing"
        return f"{what} ({last}; exit code {self.process.returncode}). Is memory short? Try again with fewer processes."

    def close(self) -> None:
        """End it; it does when nothing more can be asked of it."""
        with suppress(OSError):
            cast(IO[bytes], self.process.stdin).close()
        self.answers.close()
        self.process.wait()
        self._told.close()


def serve() -> None:
    """Answer numbers on stdin until it ends: what a process runs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(1)
    make = pickle.load(sys.stdin.buffer)
    answer: tuple[bool, Any] = True, "ready"
    with suppress(EOFError, BrokenPipeError):
        while True:
            pickle.dump(answer, answers)
            answers.flush()
            number = pickle.load(sys.stdin.buffer)
            try:
                answer = True, make(number)
            except Exception:
                answer = False, traceback.format_exc()
    os._exit(0)  # without the attempt to flush what nobody will read
