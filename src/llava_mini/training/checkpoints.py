"""Files of a run that are either wholly there or not at all, and the training state in one of them."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Facts = Mapping[str, Any]
"""Small values that JSON can hold."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give another path to write to; what is there at the end of the block takes the place of ``path`` at once.

    A kill leaves the old file or the new one. If the block fails, the old file stays.

    Args:
        path: Its folder exists.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same folder out of it. The hold ends with the process at the latest.

    Raises:
        ValueError: If another process holds the folder.
    """
    if sys.platform == "win32":  # which has no such locks
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process trains in {folder}. Wait until it ends, or give another folder."
            ) from error
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is never half there."""
    with replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Write tensors and facts; a kill leaves the old file or the new one.

    Args:
        path: Where the file will be; its folder exists.
        tensors: What to store; shared memory is copied.
        facts: Small values, stored as JSON in the header.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replaced(path) as draft:
        save_file(stored, draft, metadata={"facts": json.dumps(dict(facts))})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """Return the tensors, on the CPU, and the facts of a file that ``write_checkpoint`` made.

    Raises:
        ValueError: If the file is damaged or something else.
    """
    facts = read_facts(path)
    with _opened(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, facts


def read_facts(path: Path) -> Facts:
    """Return the facts alone, without reading the tensors.

    Raises:
        ValueError: If the file is damaged or something else.
    """
    with _opened(path, framework="np") as file:  # "pt" opens twice, and a run may replace the file in between
        header = file.metadata() or {}
    try:
        return json.loads(header["facts"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is a safetensors file but no checkpoint of a run. Remove it to start that phase anew."
        ) from error


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint ({error}). Remove it to start that phase anew, or restore it."
        ) from error


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's random numbers by device type, to be stored."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Take over what ``random_states`` returned. A GPU's state is left out where there is none."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
