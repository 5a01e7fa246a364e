"""Files of a run that are either wholly there or not at all, and the training state in one of them."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_mini.training.optimizer import MasterAdamW

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


class FolderInUseError(ValueError):
    """Another process holds a folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same folder out of it. The hold ends with the process at the latest.

    Raises:
        FolderInUseError: If another process holds the folder.
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
            raise FolderInUseError(
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

    Raises:
        OSError: If it cannot be written. What was there before is whole.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with replaced(path) as draft:
            save_file(stored, draft, metadata={"facts": json.dumps(dict(facts))})
    except (OSError, SafetensorError) as error:  # the second one where the disk is full
        raise OSError(
            f"{path} could not be written: {error}. "
            + ("The checkpoint before it is whole. " if path.exists() else "There is none before it. ")
            + "Make room, or mend the disk, and start the same command again."
        ) from error


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


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter once, under the first of its names, and what is stored besides: all can be written to."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    all_names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict().items() if name not in all_names}
    weights = {**parameters, **buffers}
    return {f"module.{name}": value if value.ndim else value.view(1) for name, value in weights.items()}


def buffer_names(module: nn.Module) -> set[str]:
    """Return the names of buffers, as in ``weights_of``: they may change while a module trains."""
    return {f"module.{name}" for name, _ in module.named_buffers()}


def state_of(module: nn.Module, optimizer: MasterAdamW) -> dict[str, Tensor]:
    """Return all tensors that a phase changes: the float32 masters of what trains, their moments, and buffers.

    They can be written to; then ``optimizer.go_on`` makes them count.
    """
    names = buffer_names(module)
    buffers = {name: value for name, value in weights_of(module).items() if name in names}
    masters = {f"module.{name}": master for name, master in zip(optimizer.names, optimizer.masters, strict=True)}
    moments = {f"optimizer.{name}": moment for name, moment in optimizer.moments().items()}
    return {**buffers, **masters, **moments}


def check_names(path: Path, stored: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse a checkpoint of something else.

    Raises:
        ValueError: If the names of its tensors are not those that are wanted.
    """
    if differing := sorted(set(stored) ^ set(wanted)):
        raise ValueError(
            f"{path} holds other tensors than this stage has, for example {', '.join(differing[:5])}. Was the recipe "
            "changed? Give an empty folder."
        )


def fill(path: Path, stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy what was read from a file into other tensors.

    Raises:
        ValueError: If they have other names or shapes.
    """
    check_names(path, _described(stored), _described(tensors))
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])


def _described(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    return (f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


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
