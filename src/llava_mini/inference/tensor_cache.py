"""Tensors kept under a key: in memory within a budget of bytes, and in a folder if one is given.

A cache knows nothing of what it keeps. Whoever asks makes keys that say everything the tensors depend on.
"""

import uuid
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_VERSION = "1"
"""Of the files. Those of another version are made anew."""

_SUFFIX = ".seen.safetensors"

Tensors = Mapping[str, Tensor]
"""What stands under a key."""


@dataclass(kw_only=True)
class CacheStats:
    """What a cache was asked for, in keys."""

    hits_in_memory: int = 0
    hits_on_disk: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of what was asked for that was at hand, 0 to 1; 0 before anything was asked for."""
        hits = self.hits_in_memory + self.hits_on_disk
        return hits / (hits + self.misses) if hits + self.misses else 0.0


@dataclass(frozen=True)
class _Entry:
    tensors: dict[str, Tensor]
    num_bytes: int
    turn: int
    """When it was last used."""


class TensorCache:
    """Tensors under keys, those that were not used for longest forgotten first. Safe to use from several threads.

    What is asked for in one turn is never forgotten for something else of the same turn. Of a film that is larger
    than the budget the first frames stay and the others are not kept; otherwise each would push out the next one
    needed, and nothing would ever be found.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        """Make an empty cache, or one that knows what is in a folder.

        Args:
            max_bytes: Most bytes of tensors in memory.
            folder: Where everything is written, too, and looked for when memory does not have it. It grows
                without a limit. None: memory only.

        Raises:
            ValueError: If the number is negative, or the folder cannot be made.
        """
        if max_bytes < 0:
            raise ValueError(f"A cache has room for 0 bytes or more, got max_bytes={max_bytes}.")
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"A cache cannot live in {str(folder)!r} ({error.strerror}). Give a folder that can be written to."
                ) from error
        self.max_bytes = max_bytes
        self.folder = folder
        self.stats = CacheStats()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._turn = 0
        self._lock = Lock()
        self._told_of_writing = False

    @property
    def keeps_anything(self) -> bool:
        """Whether there is room in memory, or a folder."""
        return self.max_bytes > 0 or self.folder is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors in memory."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        return key in self._entries or (path is not None and path.exists())

    def new_turn(self) -> int:
        """Begin a turn; ``get`` and ``put`` are told which one they belong to."""
        with self._lock:
            self._turn += 1
            return self._turn

    def get(self, key: str, turn: int) -> dict[str, Tensor] | None:
        """Return the tensors under a key, in the CPU's memory; None if there are none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._keep(key, entry.tensors, turn)
                self.stats.hits_in_memory += 1
        tensors = entry.tensors if entry is not None else self._read(key)
        if entry is None:
            with self._lock:
                self.stats.hits_on_disk += tensors is not None
                self.stats.misses += tensors is None
                if tensors is not None:
                    self._keep(key, tensors, turn)
        return tensors

    def put(self, key: str, tensors: Tensors, turn: int) -> None:
        """Keep tensors. They are copied to the CPU's memory, so that the batch they came from can go."""
        with self._lock:
            has_room = self._make_room(key, _num_bytes(tensors), turn)
        if not has_room and self.folder is None:  # most frames of a long film: not even copied
            return
        kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        with self._lock:
            self._keep(key, kept, turn)
        self._write(key, kept)

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _keep(self, key: str, tensors: dict[str, Tensor], turn: int) -> None:
        size = _num_bytes(tensors)
        if self._make_room(key, size, turn):
            self._entries[key] = _Entry(tensors, size, turn)
            self._bytes += size

    def _make_room(self, key: str, size: int, turn: int) -> bool:
        """Forget what is under a key, and what is older than a turn, until so many bytes fit; False if they do not."""
        before = self._entries.pop(key, None)
        self._bytes -= before.num_bytes if before is not None else 0
        if size > self.max_bytes:
            return False
        while self._entries and self._bytes + size > self.max_bytes:
            oldest = next(iter(self._entries))
            if self._entries[oldest].turn == turn:
                return False
            self._bytes -= self._entries.pop(oldest).num_bytes
        return True

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write a file, whole or not at all. Where it cannot be written, the answer goes on without it."""
        path = self._path(key)
        if path is None or path.exists():
            return
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata={"key": key, "version": _VERSION, "checksum": _checksum(tensors)})
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            if not self._told_of_writing:
                warnings.warn(f"The cache cannot write to {self.folder} ({error}). It goes on without.", stacklevel=3)
            self._told_of_writing = True
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _read(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors in the file of a key. A file that is damaged or another's is told of and removed."""
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (facts.get("key"), facts.get("version")) != (key, _VERSION):
                raise ValueError(f"it is of the key {facts.get('key')}, version {facts.get('version')}")
            if facts.get("checksum") != _checksum(tensors):
                raise ValueError("its checksum is another")
        except OSError:  # it may be readable later
            return None
        except (SafetensorError, RuntimeError, ValueError) as error:
            warnings.warn(f"{path} is not what this cache wrote there ({error}). It is made anew.", stacklevel=3)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return tensors


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _checksum(tensors: Tensors) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
