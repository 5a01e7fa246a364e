"""The processes that train together, one to a device, and what they tell one another.

``torchrun`` starts them. Weights and gradients travel as the strategy of ``sharding.py`` says; here are the few numbers
and errors of a step, which travel between CPUs. What one process finds wrong, all of them raise: a process that went on
alone would wait for the others until its time is up.
"""

import gc
import hashlib
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

Value = TypeVar("Value")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What ``torchrun`` tells each process."""

ANSWER_SECONDS = 10.0
"""How long the others have to say why they ended. A machine that has lost its network never does."""

BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Socket|Timed out", re.IGNORECASE)
"""How errors of torch.distributed read when another process has ended; most are plain RuntimeErrors."""

KINDS: tuple[type[Exception], ...] = (ValueError, ChildProcessError, OSError)
"""Errors that keep their kind on the way to the other processes."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run. ``World()`` is a process that trains alone.

    As a context manager it says goodbye to the others at the end of the block.
    """

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    mesh: DeviceMesh | None = None
    """All processes in a row. None: there is only one."""
    board: "Board | None" = None
    """Where the processes leave word. None: there is only one."""

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], *, device: torch.device | None = None, minutes: float = 10.0
    ) -> "World":
        """Join the processes that ``torchrun`` started, or train alone if it did not start this one.

        Args:
            environment: ``os.environ``, as the console script read it.
            device: cpu, or cuda for the GPU of this process. None: a GPU if there is one.
            minutes: How long a process waits for another before it takes it for lost.

        Raises:
            ValueError: If some of the variables of ``torchrun`` are missing, or there are fewer GPUs than processes.
            ChildProcessError: If another process does not come in time.
        """
        kind = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
        size = int(environment.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device=device or torch.device(kind))
        if missing := [name for name in VARIABLES if name not in environment]:
            raise ValueError(
                f"WORLD_SIZE is {size} but {', '.join(missing)} is not set. Start the processes with torchrun, which "
                "sets them all."
            )
        rank, local_rank = int(environment["RANK"]), int(environment["LOCAL_RANK"])
        own = torch.device(kind)
        if kind == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"Process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Give "
                    "torchrun --nproc-per-node with that number."
                )
            own = torch.device("cuda", local_rank)
            torch.cuda.set_device(own)
        timeout = timedelta(minutes=minutes)
        place = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        store, _, _ = next(iter(rendezvous(place, rank, size, timeout=timeout)))
        store = PrefixStore(name_of_start(store, rank, size, seconds=60 * minutes), store)
        distributed.init_process_group(
            backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        board = Board(PrefixStore("llava-mini", store), rank, size)
        return cls(rank=rank, size=size, device=own, mesh=init_device_mesh(kind, (size,)), board=board)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes logs and shows progress."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Return what every process passed, by rank. All processes call it, with something that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def each(self, work: Callable[[], Value]) -> list[Value]:
        """Do something in every process, and return what it gave in each, by rank.

        Raises:
            Exception: If it failed anywhere: everywhere, the error of the lowest rank that has one.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as own:
            if self.size == 1 or _is_broken_connection(own):
                raise
            error = own
        results = self.gather((result, None if error is None else _packed(error)))
        for rank, (_, failure) in enumerate(results):
            if failure is None:
                continue
            if rank == self.rank and error is not None:
                raise error
            kind, text = failure
            raise KINDS[kind](text) if kind < len(KINDS) else RuntimeError(f"Rank {rank} failed. {text}")
        return [result for result, _ in results]

    def first(self, work: Callable[[], Value]) -> Value:
        """Do something in the first process alone, and return in all what it gave, or raise what it raised."""
        return self.each(lambda: work() if self.is_first else None)[0]  # pyright: ignore[reportReturnType]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Leave word of an error inside the block for the others, and find out who broke a connection.

        Raises:
            ChildProcessError: If another process has ended. The message is one line that names it and, if it could
                still tell, the cause.
        """
        try:
            yield
        except Exception as error:
            if self.board is None or self.board.cause:  # known, or a guard inside this one has seen to it
                raise
            if not _is_broken_connection(error):
                self.board.post(_in_one_line(error), f"Rank {self.rank} failed. ")
                raise
            raise ChildProcessError(self.board.find_cause(_in_one_line(error))) from error

    @contextmanager
    def speaking_once(self, name: str) -> Iterator[None]:
        """Show an error that ends all processes once, on one line, and end each of them with code 2.

        Alone, errors pass as they are.

        Args:
            name: Of the program, before the line.

        Raises:
            SystemExit: After an error, if there are other processes.
        """
        if self.board is None:
            yield
            return
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not self.board.cause:
                raise
            if self.board.may_tell():
                print(f"{name}: {self.board.cause or _in_one_line(error)}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1 and error is None:  # after an error the others may be gone, and goodbye would wait for them
            gc.collect()  # spread modules refer to themselves and to the groups; left to Python's end, some runs abort
            distributed.destroy_process_group()


class Board:
    """Where processes leave word for one another when something ends one of them.

    It lies in the store of the rendezvous, which outlives the connections between the processes: with ``torchrun`` it
    is a process of its own.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Tell the others where this process runs."""
        self.store, self.rank, self.size = store, rank, size
        self.cause = ""
        """What ended this process, once it is known."""
        self.lost: set[int] = set()
        """Ranks that ended without a word."""
        self.host = socket.gethostname() + _boot_id()
        self.store.set(f"process/{rank}", f"{self.host} {os.getpid()}")
        self._processes = [self.store.get(f"process/{other}").decode().rsplit(" ", 1) for other in range(size)]
        """Machine and process of each rank."""

    def post(self, cause: str, beginning: str = "") -> None:
        """Leave word of what ends this process.

        Args:
            cause: One line, for this process to show.
            beginning: What the others put before it.
        """
        self.cause = cause
        with suppress(RuntimeError, OSError):  # if the store has ended, too, nobody can be told
            number = self.store.add("posts", 1)
            self.store.set(f"post/{number}", beginning + cause)
            self.store.set(f"ended/{self.rank}", "yes")

    def find_cause(self, symptom: str) -> str:
        """Return why the connection to another process broke, on one line, and leave word of it.

        The first word left counts, for all later ones follow from it. A process that was killed leaves none, but on
        the same machine it can be seen to be gone.

        Args:
            symptom: The error of the connection, on one line.
        """
        until = time.monotonic() + ANSWER_SECONDS
        found = ""
        try:
            while not found and time.monotonic() < until:
                if self.store.check(["post/1"]):
                    found = self.store.get("post/1").decode()
                else:
                    found = self._killed()
                    if not found:
                        time.sleep(0.05)
        except (RuntimeError, OSError):
            found = self._killed() or "The process that holds the rendezvous has ended, or cannot be reached."
        lost = (
            f"The processes lost one another, though none has ended ({symptom}). Was one of them busy for longer than "
            "the others wait? The same command goes on from the last checkpoint."
        )
        found = found or self._silent() or lost
        self.post(found)
        return found

    def may_tell(self) -> bool:
        """Return whether this process shows the error, after giving the lowest rank that is still there time to do so.

        That one may not have noticed: over NCCL a process waits in a kernel for one that has ended.
        """
        lowest = min({*range(self.size)} - self.lost)
        until = time.monotonic() + ANSWER_SECONDS
        try:
            while self.rank != lowest and time.monotonic() < until:
                if self.store.check(["told"]):
                    return False
                time.sleep(0.05)
            return self.store.add("told", 1) == 1
        except (RuntimeError, OSError):  # the store has ended
            return self.rank == lowest

    def _killed(self) -> str:
        """Name the processes of this machine that are gone."""
        self.lost |= {
            rank for rank, (host, pid) in enumerate(self._processes) if host == self.host and not _is_alive(int(pid))
        }
        if not self.lost:
            return ""
        return (
            f"{self._names(self.lost)} ended without a word: killed, perhaps because memory ran out. The same command "
            "goes on from the last checkpoint."
        )

    def _silent(self) -> str:
        """Name the processes of other machines that have left no word."""
        others = [rank for rank, (host, _) in enumerate(self._processes) if host != self.host]
        silent = {rank for rank in others if not self.store.check([f"ended/{rank}"])}
        self.lost |= silent
        if not silent:
            return ""
        return (
            f"{self._names(silent)} ended without a word, or the network to that machine failed. The same "
            "command goes on from the last checkpoint."
        )

    def _names(self, ranks: Iterable[int]) -> str:
        named = [(rank, *self._processes[rank]) for rank in sorted(ranks)]
        text = " and ".join(f"rank {rank} (process {pid} on {host.split('/')[0]})" for rank, host, pid in named)
        return text[:1].upper() + text[1:]


def name_of_start(store: Store, rank: int, size: int, *, seconds: float) -> str:
    """Return a name that the processes of this start have in common, and those of no other.

    When ``torchrun`` starts processes again, its store still holds what the dead ones left. So each draws a name, and
    all take that of the whole only when each has signed it: with what a dead one drew, it stays unsigned.

    Raises:
        ChildProcessError: If that takes longer than so many seconds.
    """
    store.set(f"start/{rank}", uuid.uuid4().hex)
    until = time.monotonic() + seconds
    with suppress(RuntimeError, OSError):
        while time.monotonic() < until:
            drawn = [store.get(f"start/{other}") for other in range(size)]
            name = hashlib.blake2b(b"".join(drawn), digest_size=16).hexdigest()
            store.set(f"{name}/{rank}", "signed")
            if store.check([f"{name}/{other}" for other in range(size)]):
                return name
            time.sleep(0.05)
    raise ChildProcessError(
        f"Not all of the {size} processes came within {seconds:.0f} seconds. Look for the error of another one, and "
        "whether all machines reach the address that torchrun was given."
    )


def _is_broken_connection(error: BaseException) -> bool:
    """Return whether an error says that another process has gone, and not what this process did wrong."""
    if isinstance(error, distributed.DistError):
        return True
    text = f"{error} {error.__cause__ or ''}"
    return isinstance(error, RuntimeError) and BROKEN.search(text) is not None


def _packed(error: Exception) -> tuple[int, str]:
    """Return which of ``KINDS`` an error is, or a number after the last, and its text."""
    kinds = [number for number, kind in enumerate(KINDS) if isinstance(error, kind)]
    return (kinds[0], str(error)) if kinds else (len(KINDS), _in_one_line(error))


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and another user's
        return True
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")  # ended, but not yet collected
    except OSError:
        return not Path("/proc/self/stat").exists()


def _boot_id() -> str:
    """Return what tells machines of one name apart, where there is such a thing."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return f"/{path.read_text().strip()}" if path.exists() else ""
