"""Making the batches of the next steps while the present one is learned."""

import contextlib
import io
import multiprocessing
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Calls a function of the step ahead of time, in a thread or in processes; what it returns does not change.

    Use it as a context manager, or call ``close``: processes end there.
    """

    def __init__(
        self, make: Callable[[int], Batch], *, end: int = sys.maxsize, workers: int = 0, ahead: int = 1
    ) -> None:
        """Wrap a function.

        Args:
            make: Its result depends on the step alone. With workers it is pickled, and so are its results.
            end: Steps from here on are not made ahead.
            workers: Processes that make batches, each one thread wide. 0: a thread of this process.
            ahead: So many are made ahead at least; with workers, two for each if that is more.

        Raises:
            ChildProcessError: If a process does not start.
        """
        self.end = end
        self.num_ahead = max(2 * workers, ahead)
        self._ahead: dict[int, Future[Batch]] = {}
        self._workers: list[_Worker[Batch]] = []
        if workers:
            self._start(pickle.dumps(make), workers)
        self._idle: SimpleQueue[Callable[[int], Batch]] = SimpleQueue()
        for maker in self._workers or [make]:
            self._idle.put(maker)
        self._threads = ThreadPoolExecutor(max_workers=max(workers, 1), thread_name_prefix="batches")

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, and begin with the next ones.

        Raises:
            ChildProcessError: If a process died.
        """
        wanted = range(step, max(min(step + 1 + self.num_ahead, self.end), step + 1))
        for other in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(other).cancel()
        for one in wanted:
            if one not in self._ahead:
                self._ahead[one] = self._threads.submit(self._make, one)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Make nothing more, and end the processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> "Prefetch[Batch]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, make: bytes, workers: int) -> None:
        resource_tracker.ensure_running()  # its start would let signals through again
        try:
            with _signals_held():
                for _ in range(workers):
                    self._workers.append(_Worker(make))
            for worker in self._workers:
                worker.receive()
        except BaseException:
            for worker in self._workers:
                worker.close()
            raise

    def _make(self, step: int) -> Batch:
        maker = self._idle.get()
        try:
            return maker(step)
        finally:
            self._idle.put(maker)


class _Worker(Generic[Batch]):
    """A process that makes one batch at a time. It ends when this process does, however that comes about."""

    def __init__(self, make: bytes) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the state of GPU and threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, step: int) -> Batch:
        with contextlib.suppress(OSError):  # told below
            self._pipe.send(step)
        made, value = self.receive()
        if not made:
            raise value
        return value

    def receive(self) -> Any:
        """Return the next message: one when it is ready, then one for each step."""
        try:
            return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise ChildProcessError(
                f"A process that makes batches died with exit code {self._process.exitcode}. Is the memory full (-9)? "
                "Start again, with fewer workers. Did a file crash its decoder (-11)? llava-mini data check names it. "
                "A script of your own has to begin training under: if __name__ == '__main__'."
            ) from error

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, make: bytes) -> None:
    """Answer steps with batches until the other end of the pipe is closed."""
    torch.set_num_threads(1)
    make_batch = pickle.loads(make)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send_bytes(pickle.dumps("ready"))
        while True:
            step = pipe.recv()
            try:
                answer = True, make_batch(step)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            message = io.BytesIO()
            _Pickler(message, protocol=pickle.HIGHEST_PROTOCOL).dump(answer)
            pipe.send_bytes(message.getbuffer())


class _Pickler(pickle.Pickler):
    """Copies tensors into the message as arrays: torch's own ways are slow, or need shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype != torch.bfloat16 and not value.requires_grad:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: they end with their parent, which finishes its step first."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
