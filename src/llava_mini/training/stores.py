"""The two ways in which a phase keeps its checkpoints, behind one face.

A small model of one process keeps one file, which each checkpoint replaces and a kill leaves whole. Anything else keeps
folders (``folders.py``): every process writes its own part, and another number of processes reads them. The tensors are
the same in both: all that training changes, and nothing that is frozen (``frozen.py``).
"""

from pathlib import Path
from typing import Protocol

from torch import nn

from llava_mini.training.checkpoints import (
    Facts,
    fill,
    random_states,
    read_checkpoint,
    read_facts,
    restore_random_states,
    state_of,
    weights_of,
    write_checkpoint,
)
from llava_mini.training.folders import CheckpointFolders, load_folder, newest_folder, read_folder_facts
from llava_mini.training.frozen import FROZEN, check_frozen, check_version, frozen_digests
from llava_mini.training.optimizer import MasterAdamW
from llava_mini.training.world import World

CHECKPOINT = "checkpoint.safetensors"
"""Name of the file that a phase of one process goes on from."""

SAME = ("phase", "num_steps", "micro_batches", "data")
"""Facts of a phase that stay as they were when it goes on."""


def progress_of(folder: Path) -> tuple[int, float]:
    """Return how many steps the checkpoint in ``folder`` has seen, and the seconds they took; 0 without one."""
    newest, path = newest_folder(folder), folder / CHECKPOINT
    facts = read_folder_facts(newest) if newest else read_facts(path) if path.exists() else {}
    return int(facts.get("step", 0)), float(facts.get("seconds", 0.0))


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load what was learned up to the newest checkpoint in ``folder``, in one process.

    Args:
        module: As it was built for that training: what is frozen stays as it is.
        folder: Of the phase.

    Raises:
        ValueError: If the checkpoint is damaged or of another module, or what was frozen differs.
    """
    newest = newest_folder(folder)
    path = newest or folder / CHECKPOINT
    facts = read_folder_facts(path) if newest else read_facts(path)
    check_version(path, facts)
    if newest:
        learned = load_folder(module, newest)
    else:
        tensors, _ = read_checkpoint(path)
        stored = {name: value for name, value in tensors.items() if name.startswith("module.")}
        learned = {name: value for name, value in weights_of(module).items() if name in stored}
        fill(path, stored, learned)
    check_frozen(path, facts, frozen_digests(module, learned))


class Store(Protocol):
    """The checkpoints of a phase. All processes call its methods together."""

    @property
    def last_good(self) -> str:
        """A sentence that says where the newest checkpoint is."""
        ...

    def open(self) -> None:
        """Make the folder."""
        ...

    def resume(self, module: nn.Module, optimizer: MasterAdamW, expected: Facts) -> Facts:
        """Read the newest checkpoint into a module and its optimizer.

        Args:
            module: Of the task.
            optimizer: Not used yet.
            expected: Facts of a fresh start.

        Returns:
            Its facts, or those of a fresh start.

        Raises:
            ValueError: If it is damaged, of another phase or other data, or of an earlier version, or what is frozen
                differs.
        """
        ...

    def save(self, module: nn.Module, optimizer: MasterAdamW, facts: Facts) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it cannot be written; the one before is whole.
        """
        ...


def store_of(folder: Path, keep_last: int | None, world: World) -> Store:
    """Return what keeps the checkpoints of a phase.

    Args:
        folder: Of the phase.
        keep_last: How many folders to keep. None: one file.
        world: The processes.

    Raises:
        ValueError: If several processes would write one file.
    """
    if keep_last is not None:
        return _Folders(CheckpointFolders(folder=folder, keep_last=keep_last, world=world))
    if world.size > 1:
        raise ValueError(
            f"Checkpoints in one file are for one process, and there are {world.size}. Set keep_last, the number of "
            "checkpoint folders that stay."
        )
    return _OneFile(folder)


class _OneFile:
    """Checkpoints of one process: a file that each replaces."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT
        self.last_good = f"The last good state is in {self.path}."

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def resume(self, module: nn.Module, optimizer: MasterAdamW, expected: Facts) -> Facts:
        """Go on from the file, which is written first if there is none: random numbers go on from it, too."""
        if not self.path.exists():
            self.save(module, optimizer, expected)
        tensors, facts = read_checkpoint(self.path)
        _check_facts(self.path, facts, expected)
        random = {name: value for name, value in tensors.items() if name.startswith("random.")}
        stored = {name: value for name, value in tensors.items() if name not in random}
        fill(self.path, stored, state_of(module, optimizer))
        check_frozen(self.path, facts, expected[FROZEN])
        optimizer.go_on(facts["step"])
        restore_random_states({name.removeprefix("random."): value for name, value in random.items()})
        return facts

    def save(self, module: nn.Module, optimizer: MasterAdamW, facts: Facts) -> None:
        random = {f"random.{name}": value for name, value in random_states().items()}
        write_checkpoint(self.path, {**state_of(module, optimizer), **random}, facts)


class _Folders:
    """Checkpoints of any number of processes: a folder each."""

    def __init__(self, checkpoints: CheckpointFolders) -> None:
        self.checkpoints = checkpoints

    @property
    def last_good(self) -> str:
        newest = newest_folder(self.checkpoints.folder)
        return f"The last good state is in {newest}." if newest else "There is no checkpoint yet."

    def open(self) -> None:
        self.checkpoints.open()

    def resume(self, module: nn.Module, optimizer: MasterAdamW, expected: Facts) -> Facts:
        newest = self.checkpoints.newest()
        if newest is None:
            return expected
        path, facts = newest
        _check_facts(path, facts, expected)
        self.checkpoints.load(path, facts, module, optimizer, frozen=expected[FROZEN])
        return facts

    def save(self, module: nn.Module, optimizer: MasterAdamW, facts: Facts) -> None:
        self.checkpoints.save(module, optimizer, facts)


def _check_facts(path: Path, facts: Facts, expected: Facts) -> None:
    check_version(path, facts)
    if differing := [name for name in SAME if facts.get(name) != expected[name]]:
        found, wanted = ({name: one.get(name) for name in differing} for one in (facts, expected))
        what = "folder" if path.is_dir() else "file"
        raise ValueError(
            f"{path} holds {found} but this run has {wanted}. Give another folder, remove the {what}, or keep "
            "accumulate times the number of processes, the steps and the data as they were."
        )
