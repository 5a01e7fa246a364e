"""Processes for tests that need several: quick to start, and what became of each is told."""

import contextlib
import multiprocessing
import socket
import sys
from dataclasses import dataclass
from typing import Any

import torch

from llava_mini.training.world import World

SECONDS = 100
_CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once, for all of them
_CONTEXT.set_forkserver_preload(["llava_mini.training.trainer"])


@dataclass(frozen=True)
class End:
    """How a process ended."""

    value: Any = None
    """What the function returned."""
    error: str = ""
    """Name of the type of the error."""
    text: str = ""
    """Of the error."""
    terminal: str = ""
    """What it wrote to standard error."""
    code: int | None = None
    """Exit code; negative: the signal that killed it."""


def run_ranks(size, function, tmp_path, *arguments, once=False):
    """Call ``function(world, *arguments)`` in so many processes, and return how each ended.

    ``once``: errors are shown once, as by the command line.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        terminal = tmp_path / f"terminal-{port}-{rank}"
        process = _CONTEXT.Process(
            target=_run, args=(theirs, environment, str(terminal), function, arguments, once), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append((ours, terminal))
        processes.append(process)
    ends = []
    for process, (pipe, terminal) in zip(processes, pipes, strict=True):
        value, error, text = None, "", ""
        with contextlib.suppress(EOFError):
            if not pipe.poll(SECONDS):
                process.kill()
                text = "no answer"
            else:
                value, error, text = pipe.recv()
        process.join(SECONDS)
        told = terminal.read_text() if terminal.exists() else ""
        ends.append(End(value, error, text, told, process.exitcode))
    return ends


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _run(pipe, environment, terminal, function, arguments, once):
    torch.set_num_threads(1)
    sys.stderr = open(terminal, "w", buffering=1)  # noqa: PTH123, SIM115
    result = (None, "", "")
    try:
        world = World.from_environment(environment, device=torch.device("cpu"), minutes=1)
        with world, world.speaking_once("llava-mini") if once else contextlib.nullcontext():
            result = (function(world, *arguments), "", "")
    except BaseException as error:
        result = (None, type(error).__name__, str(error))
    pipe.send(result)
    pipe.close()
