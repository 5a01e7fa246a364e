"""Several files of records in the format of LLaVA as one sequence of samples.

A mixture holds where each record lies, what it shows and how long it is: 18 bytes per record. Records stay in their
files and are read one at a time, so a mixture is cheap to send to the processes that make batches.
"""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini.data.json_records import read_record, scan_records
from llava_mini.data.llava_format import outline, sample_from_record
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import KINDS, Sample


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A JSON or JSONL file of records in the format of LLaVA."""

    path: Path
    media_folder: Path | None = None
    """Where the paths of its images and videos start. None: the folder of the file."""
    weight: float = 1.0
    """How often a record is seen in an epoch: 2 is twice, 0.5 is every other record."""
    name: str = ""
    """The first part of the ids of its samples. Empty: the name of the file without its ending, with as many folders
    before it as tell it from the other files."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"The weight of {str(self.path)!r} is {self.weight}; it must be a number above 0. Leave the file out "
                "if it is not to be seen."
            )

    @property
    def folder(self) -> Path:
        """Where the paths of its media start."""
        return self.path.parent if self.media_folder is None else self.media_folder


class Mixture(Sequence[Sample]):
    """All records of some files, one after the other, each once: weights are the business of ``BatchOrder``."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        """Read all files once to find their records.

        Args:
            files: In the order of their samples.

        Raises:
            ValueError: There are no files, one is missing, malformed, or has no record in the format of LLaVA, or two
                have one name.
        """
        if not files:
            raise ValueError("A mixture needs at least one data file, got none.")
        self.files = _named(files)
        indices = [_index(file) for file in self.files]
        self.kinds = np.concatenate([index.kinds for index in indices])
        """[N] int8: what each record shows, as its place in ``samples.KINDS``."""
        self.lengths = np.concatenate([index.lengths for index in indices])
        """[N] int32: how long each record is, by ``llava_format.outline``: that needs no tokenizer."""
        self.first = np.cumsum([0, *(len(index.kinds) for index in indices)])
        """[files + 1]: number of the first record of each file, and their total."""
        self._starts = np.concatenate([index.starts for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._repeated = np.concatenate([index.repeated for index in indices])
        self._stamps = [index.stamp for index in indices]

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the files."""
        return tuple(file.weight for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Equal for mixtures whose records have the same names, weights, places and lengths."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr([(file.name, file.weight) for file in self.files]).encode())
        for values in (self.first, self._starts, self._sizes, self.kinds, self.lengths):
            digest.update(values.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Sample:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        """Read a record.

        Raises:
            IndexError: There are not so many.
            ValueError: The record is malformed.
            OSError: The file was changed since the mixture was made, or cannot be read.
        """
        index, source, number = self._place(index)
        record = self._read(index, source)
        name = self._id(record, index, source, number)
        return sample_from_record(record, name=name, media_folder=self.files[source].folder)

    def sample(self, index: int) -> Sample | Damaged:
        """Read a record; of a malformed one, say what is wrong. Raises else what reading does."""
        try:
            return self[index]
        except ValueError as error:
            return Damaged(id=self.id_of(index), media="", reason=" ".join(str(error).split()))

    def id_of(self, index: int) -> str:
        """Return the id of a sample, also where the record is malformed."""
        index, source, number = self._place(index)
        try:
            record = self._read(index, source)
        except ValueError:
            record = None
        return self._id(record, index, source, number)

    def file_of(self, index: int) -> DataFile:
        """Return the file in which a record lies."""
        return self.files[self._place(index)[1]]

    def _place(self, index: int) -> tuple[int, int, int]:
        """The index from 0 on, the number of its file, and its number in the file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no sample {index} in a mixture of {len(self)}.")
        index %= len(self)
        source = int(np.searchsorted(self.first, index, side="right")) - 1
        return index, source, index - int(self.first[source])

    def _read(self, index: int, source: int) -> Any:
        path = self.files[source].path
        if _stamp(path) != self._stamps[source]:
            raise OSError(f"The data file {str(path)!r} was changed while it was in use. Start again.")
        return read_record(path, int(self._starts[index]), int(self._sizes[index]))

    def _id(self, record: Any, index: int, source: int, number: int) -> str:
        suffix = f"#{number}" if self._repeated[index] else ""
        return f"{self.files[source].name}/{_own_id(record, number)}{suffix}"


@dataclass(frozen=True, kw_only=True)
class _Index:
    """Of one file; all arrays have one entry per record."""

    starts: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    lengths: np.ndarray
    repeated: np.ndarray
    """Whether an earlier record has the same id."""
    stamp: tuple[int, int]


def _index(file: DataFile) -> _Index:
    starts, sizes, kinds, lengths, repeated = array("q"), array("i"), array("b"), array("i"), array("b")
    numbers = {kind: number for number, kind in enumerate(KINDS)}
    ids: set[str] = set()
    has_conversation = False
    keys: Counter[str] = Counter()
    stamp = _stamp(file.path) if file.path.is_file() else (0, 0)
    for start, size, record in scan_records(file.path):
        kind, length = outline(record)
        own_id = _own_id(record, len(starts))
        repeated.append(own_id in ids)
        ids.add(own_id)
        starts.append(start)
        sizes.append(size)
        kinds.append(numbers[kind])
        lengths.append(length)
        if isinstance(record, dict):
            has_conversation |= "conversations" in record
            keys.update(record.keys() if len(starts) <= 10 else ())
    if not has_conversation:
        held = f"its {len(starts)} records hold {', '.join(sorted(keys)) or 'nothing'}" if starts else "it is empty"
        raise ValueError(
            f"{str(file.path)!r} has no records in the format of LLaVA: {held[:300]}. Each record needs a list of "
            "turns under 'conversations'."
        )
    return _Index(
        starts=np.array(starts, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int32),
        kinds=np.array(kinds, dtype=np.int8),
        lengths=np.array(lengths, dtype=np.int32),
        repeated=np.array(repeated, dtype=bool),
        stamp=stamp,
    )


def _own_id(record: Any, number: int) -> str:
    """The id in a record, or its number in the file."""
    given = record.get("id") if isinstance(record, dict) else None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        given = number
    return str(given).encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _named(files: Sequence[DataFile]) -> tuple[DataFile, ...]:
    """The files, each with a name of its own."""
    resolved = [file.path.resolve() for file in files]
    for path, count in Counter(resolved).items():
        if count > 1:
            raise ValueError(f"The data file {str(path)!r} is given {count} times. Give it once, with a higher weight.")
    names = [file.name or file.path.stem for file in files]
    for depth in range(2, 2 + max(len(path.parts) for path in resolved)):
        shared = {name for name, count in Counter(names).items() if count > 1}
        names = [
            "/".join((*path.parts[-depth:-1], path.stem)) if name in shared and not file.name else name
            for file, path, name in zip(files, resolved, names, strict=True)
        ]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"Two data files are called {twice!r}. Give each a name of its own.")
    return tuple(replace(file, name=name) for file, name in zip(files, names, strict=True))
