"""Checkpoints of a run of any number of processes: a folder each, which any other number goes on from.

``torch.distributed.checkpoint`` writes the part of every process as safetensors files (nothing is pickled) and puts
together what another number of processes asks for. A folder is made under another name and moved when it is complete,
so what has the name of a checkpoint is one. What trains is stored once, in float32, and what is frozen not at all
(``frozen.py``).

    step-00000120/facts.json                                 step, settings, measurements so far
    step-00000120/shard-00001-model-00001-of-00001.safetensors
"""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llava_mini.training.checkpoints import (
    Facts,
    check_names,
    random_states,
    restore_random_states,
    state_of,
    weights_of,
)
from llava_mini.training.frozen import check_frozen
from llava_mini.training.optimizer import MasterAdamW
from llava_mini.training.world import World

FACTS = "facts.json"
FILE_BYTES = 2 * 2**30
"""About the size of a file: so much is copied into memory at a time."""
NAME = re.compile(r"step-(\d{8,})")
SHARED_SECONDS = 10.0
"""How long a folder may take to be seen by another machine."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFolders:
    """The checkpoints of one phase."""

    folder: Path
    keep_last: int
    """How many stay."""
    world: World

    def open(self) -> None:
        """Make the folder, and remove what a kill left unfinished.

        Raises:
            ValueError: If the machines of the run do not share the folder.
        """
        self.world.first(self._tidy)
        self._make_draft(self.folder / ".shared.draft")
        self.world.first(lambda: (self.folder / ".shared.draft").rmdir())

    def newest(self) -> tuple[Path, Facts] | None:
        """Return the folder to go on from and its facts, if there is one: in all processes what the first one sees.

        Raises:
            ValueError: If it is damaged.
        """

        def look() -> tuple[Path, Facts] | None:
            path = newest_folder(self.folder)
            return None if path is None else (path, read_folder_facts(path))

        return self.world.first(look)

    def save(self, module: nn.Module, optimizer: MasterAdamW, facts: Facts) -> None:
        """Write a checkpoint, then remove the oldest.

        Raises:
            OSError: If it cannot be written, in all processes. Those before it are whole.
        """
        path = self.folder / f"step-{facts['step']:08d}"
        draft = path.with_name(f".{path.name}.draft")
        tensors = state_of(module, optimizer)
        tensors |= {f"random.{name}.{self.world.rank}": value for name, value in random_states().items()}
        try:
            self._make_draft(draft)
            self.world.each(lambda: _write(draft, tensors, self.world))
            self.world.first(lambda: _publish(draft, path, facts))
        except OSError as error:
            self.world.first(self._tidy)
            before = newest_folder(self.folder)
            raise OSError(
                f"The checkpoint of step {facts['step']} could not be written to {self.folder}: {error}. "
                + (f"The one before, {before.name}, is whole. " if before else "There is none before it. ")
                + "Make room, or mend the disk, and start the same command again."
            ) from error
        self.world.first(self._prune)

    def load(
        self, path: Path, facts: Facts, module: nn.Module, optimizer: MasterAdamW, *, frozen: Mapping[str, str]
    ) -> None:
        """Read a checkpoint into a module and its optimizer, wherever their tensors lie.

        Args:
            path: From ``newest``.
            facts: Likewise.
            module: Of the task.
            optimizer: Not used yet.
            frozen: Digests of what does not train.

        Raises:
            ValueError: If it is damaged, or of another module or stage, or what is frozen differs.
        """
        tensors, stored = state_of(module, optimizer), self.world.first(lambda: _stored_names(path))
        check_names(path, (name for name in stored if not name.startswith("random.")), tensors)
        check_frozen(path, facts, frozen)
        random = {
            name: torch.empty_like(value)
            for name, value in random_states().items()
            if f"random.{name}.{self.world.rank}" in stored
        }
        own = {f"random.{name}.{self.world.rank}": value for name, value in random.items()}
        self.world.each(lambda: _read(path, {**tensors, **own}, no_dist=self.world.size == 1))
        optimizer.go_on(facts["step"])
        if "cpu" in random:
            restore_random_states(random)

    def _make_draft(self, draft: Path) -> None:
        self.world.first(lambda: draft.mkdir(parents=True))

        def look() -> None:
            until = time.monotonic() + SHARED_SECONDS
            while not draft.is_dir():
                if time.monotonic() > until:
                    raise ValueError(
                        f"{self.folder} is not the same folder on all machines of the run. Give one that they share."
                    )
                time.sleep(0.1)
                newest_folder(self.folder)  # makes a network disk look again

        self.world.each(look)

    def _tidy(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.draft"):
            if left.is_dir():
                shutil.rmtree(left)

    def _prune(self) -> None:
        for old in _folders(self.folder)[: -self.keep_last]:
            gone = old.with_name(f".{old.name}.draft")
            old.rename(gone)  # half of a checkpoint must not have the name of one
            shutil.rmtree(gone)


def newest_folder(folder: Path) -> Path | None:
    """Return the checkpoint of the latest step in the folder of a phase."""
    return next(reversed(_folders(folder)), None)


def read_folder_facts(path: Path) -> Facts:
    """Return what a checkpoint knows besides its tensors.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {FACTS} cannot be read ({error}). {_ADVICE}") from error


def load_folder(module: nn.Module, path: Path) -> set[str]:
    """Read the weights of a checkpoint into the module that was trained, whole and in one process.

    Returns:
        Names of what it held.

    Raises:
        ValueError: If it is damaged, or of another module.
    """
    names = {name for name in _stored_names(path) if name.startswith("module.")}
    tensors = {name: value for name, value in weights_of(module).items() if name in names}
    check_names(path, names, tensors)
    _read(path, tensors, no_dist=True)
    return names


_ADVICE = "Remove that folder to go on from the checkpoint before it."


def _folders(folder: Path) -> list[Path]:
    """Checkpoints, the oldest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _write(draft: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    writer = HuggingFaceStorageWriter(str(draft), fqn_to_index_mapping=_files_of(tensors, world), save_distributed=True)
    _alone_is_fine(lambda: save(dict(tensors), storage_writer=writer, no_dist=world.size == 1))


def _read(path: Path, tensors: Mapping[str, Tensor], *, no_dist: bool) -> None:
    try:
        reader = HuggingFaceStorageReader(str(path))
        _alone_is_fine(lambda: load(dict(tensors), storage_reader=reader, no_dist=no_dist))
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({' '.join(str(error).split())}). {_ADVICE}") from error


def _stored_names(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint.

    Raises:
        ValueError: If it is damaged, or lacks a part of one of them, which reading alone would leave as it was.
    """
    try:
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}). {_ADVICE}") from error
    for name, tensor in stored.items():
        assert isinstance(tensor, TensorStorageMetadata)
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(f"{path} is incomplete: of {name} some parts are missing. {_ADVICE}")
    return set(stored)


def _files_of(tensors: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """Spread tensors over files, counted from 1, of which every process writes about ``FILE_BYTES``."""
    files, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        if name.startswith("random."):
            kind = name.rpartition(".")[0]
            files |= {f"{kind}.{rank}": 1 for rank in range(world.size)}
            continue
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > FILE_BYTES * world.size:
            number, size = number + 1, 0
        files[name], size = number, size + num_bytes
    return files


def _publish(draft: Path, path: Path, facts: Facts) -> None:
    text = json.dumps(dict(facts), indent=1) + "\n"
    with (draft / FACTS).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def _alone_is_fine(work: Callable[[], Any]) -> None:
    """Run what warns of a single process, and turn the error of any process into one of a kind that can be caught.

    Raises:
        OSError: If a file could not be written or read.
        RuntimeError: If anything else failed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            work()
        except CheckpointException as error:
            failures = [failure for failure, _ in error.failures.values()]
            chosen = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
            kind = OSError if isinstance(chosen, OSError) else RuntimeError
            raise kind(" ".join(str(chosen).split())) from error
