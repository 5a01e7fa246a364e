"""Data larger than a disk: Parquet files and WebDataset shards, read while training goes on.

A shard is one file, here or at an address that fsspec reads (``hf://``, ``s3://``, ``https://``). The order of an epoch
is a pure function of the seed and its number: shards are shuffled, dealt to the ranks, and read one after the other;
inside a shard, records are mixed within windows. A window is also where micro-batches are made of what is alike: they
are runs of consecutive records. The place in an epoch is therefore a shard and a number of records, which ``datasets``
counts and restores (its own shuffle buffer forgets its content there, so it is not used).

A record is one of LLaVA (``llava_format``). In Parquet it is a row: ``conversations``, and ``image``, ``images`` or
``video`` as paths, as bytes, or as the structs of bytes and path that ``datasets`` writes. In a tar it is the members
``KEY.json`` and its media, ``KEY.jpg``, ``KEY.0.jpg`` and ``KEY.1.jpg``, or ``KEY.mp4``, side by side.
"""

import hashlib
import importlib.util
import itertools
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava_mini.data.llava_format import MEDIA_KEYS, outline, sample_from_record
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import KINDS, Sample

Record = dict[str, Any]
"""A record as read: media are paths or bytes."""

_MEDIA_SUFFIXES = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
}
_COLUMNS = ("conversations", *itertools.chain.from_iterable(MEDIA_KEYS.values()))


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Which shards are read, and in which order."""

    shards: tuple[str, ...]
    """Files or addresses, each a ``.parquet`` or a ``.tar``. Records are mixed within a shard: write shards that are
    mixed."""
    name: str
    """What the ids of its samples begin with."""
    media_folder: Path | None = None
    """Where paths in the records start. None: records hold their media."""
    seed: int = 0
    """Of the order."""
    window: int = 2048
    """How many consecutive records of a shard are mixed, and put together by kind and length: as many are in memory at
    a time."""

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("A stream needs at least one shard, got none. Does the pattern match any file?")
        for shard, count in Counter(self.shards).items():
            if count > 1:
                raise ValueError(f"The shard {shard!r} is named twice. Give each shard once.")
            _reader_of(shard)
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be 1 (records in their order) or more.")
        _require_datasets()

    @cached_property
    def fingerprint(self) -> str:
        """A short digest of all that the order depends on."""
        facts = [self.seed, self.window, *sorted(self.shards)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @cached_property
    def _shared(self) -> int:
        """How many characters the folders that all shards lie in take at the beginning of each."""
        folders = [shard.split("/")[:-1] for shard in self.shards]
        same = itertools.takewhile(lambda column: len({*column}) == 1, zip(*folders, strict=False))
        return sum(len(column[0]) + 1 for column in same)

    def read(self, shard: str) -> Iterator[Sample | Damaged]:
        """Yield the samples of a shard in the order in which they lie there."""
        return map(self.sample, _told_of_damage(shard))

    def sample(self, item: Record) -> Sample | Damaged:
        """Return what an item of a shard teaches, or why it teaches nothing."""
        name = f"{self.name}/{item['shard'][self._shared :]}/{item['key']}"
        if item["damage"]:
            return Damaged(id=name, media=item["shard"], reason=item["damage"])
        try:
            return sample_from_record(item["record"], name=name, media_folder=self.media_folder)
        except ValueError as error:
            return Damaged(id=name, media="", reason=str(error))


class SampleStream:
    """The samples of one rank, an epoch at a time, and where they stand.

    Iterating goes on where the last iteration of this object stopped, or where ``load_state_dict`` put it. The end of
    an iteration is the end of an epoch: the next one begins the next epoch. No record is on two ranks in an epoch;
    ranks need not have equally many.
    """

    def __init__(self, settings: StreamSettings, *, rank: int = 0, world_size: int = 1, batch_size: int = 1) -> None:
        """Begin with epoch 0.

        Args:
            settings: The same on all ranks.
            rank: Which of the processes this is, from 0.
            world_size: How many there are. With fewer shards than that, every rank reads all of them and keeps its
                share.
            batch_size: Most samples of a micro-batch. The samples of one follow one another.

        Raises:
            ValueError: There is no such rank, or a micro-batch holds nothing.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"There is no rank {rank} among {world_size} processes. Ranks are counted from 0.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
        self.settings, self.rank, self.world_size, self.batch_size = settings, rank, world_size, batch_size
        self.epoch = 0
        self._start: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Sample | Damaged]:
        """Yield the rest of the epoch. A record or a shard that cannot be read is told as ``Damaged``."""
        return (sample for sample, _ in self._rest())

    def batches(self) -> Iterator[list[Sample | Damaged]]:
        """Yield the rest of the epoch in micro-batches, each of one kind and similar length but where kinds meet.

        All are full if the window is a multiple of them, but for the last ones of a shard. Behind each of them the
        stream stands behind its last sample.
        """
        batch: list[Sample | Damaged] = []
        for sample, is_last in self._rest():
            batch.append(sample)
            if is_last or len(batch) == self.batch_size:  # ranks that share a shard do not see all last ones
                yield batch
                batch = []
        if batch:
            yield batch

    def _rest(self) -> Iterator[tuple[Sample | Damaged, bool]]:
        """Samples, and whether each is the last of its micro-batch."""
        dataset = self._epoch_dataset()
        if self._start is not None:
            dataset.load_state_dict(self._start)
        for item in dataset:
            self._start = dataset.state_dict()
            yield self.settings.sample(item), item["is_last"]
        self.epoch, self._start = self.epoch + 1, None

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as plain JSON: behind the sample that it yielded last."""
        return {**self._facts(), "epoch": self.epoch, "dataset": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream with the same settings, rank and number of ranks stood.

        Raises:
            ValueError: It had others.
        """
        for name, value in self._facts().items():
            if state.get(name) != value:
                raise ValueError(
                    f"The state of a stream has {name} {state.get(name)!r}, but this one has {value!r}: its records "
                    "come in another order. Go on with the same shards, seed, window, number of processes and size of "
                    "micro-batches, or begin anew."
                )
        self.epoch, self._start = state["epoch"], state["dataset"]

    def _facts(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "settings": self.settings.fingerprint,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def _epoch_dataset(self) -> Any:
        from datasets import IterableDataset
        from datasets.distributed import split_dataset_by_node

        order = f"{self.settings.seed} {self.epoch}"
        shards = sorted(self.settings.shards)
        random.Random(order).shuffle(shards)
        dataset = IterableDataset.from_generator(
            _read_shards,
            gen_kwargs={
                "shards": shards,
                "order": order,
                "window": self.settings.window,
                "batch_size": self.batch_size,
            },
        )
        strategy = "shards" if len(shards) >= self.world_size else "examples"
        return split_dataset_by_node(dataset, rank=self.rank, world_size=self.world_size, strategy=strategy)


def _require_datasets() -> None:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("Streaming needs the package datasets: pip install 'llava-mini[data]'.")


def _read_shards(shards: Sequence[str], order: str, window: int, batch_size: int) -> Iterator[Record]:
    """Read shards in their order. Called by ``datasets`` with one shard at a time."""
    for shard in shards:
        chance = random.Random(f"{order} {shard}")
        records = _told_of_damage(shard)
        while mixed := list(itertools.islice(records, window)):
            chance.shuffle(mixed)
            for batch in _alike(mixed, batch_size, chance):
                yield from ({**item, "is_last": item is batch[-1]} for item in batch)


def _alike(items: Sequence[Record], batch_size: int, chance: random.Random) -> list[list[Record]]:
    """Micro-batches of items of one kind and similar length but where kinds meet, in a random order."""
    by_likeness = sorted(items, key=_likeness)  # where items are alike, in the order in which they came
    number = -(-len(items) // batch_size)
    edges = [len(items) * place // number for place in range(number + 1)]
    batches = [by_likeness[start:stop] for start, stop in itertools.pairwise(edges)]
    chance.shuffle(batches)
    return batches


def _likeness(item: Record) -> tuple[int, int]:
    """Kind and length, by turns up and down, so that lengths do not jump where kinds meet."""
    kind, length = outline(item["record"])
    number = KINDS.index(kind)
    return number, -length if number % 2 else length


def _told_of_damage(shard: str) -> Iterator[Record]:
    """The records of a shard; where it cannot be read, one last entry that says so."""
    import fsspec

    number = 0
    try:
        with fsspec.open(shard, "rb") as file:
            for key, record, damage in _reader_of(shard)(cast(BinaryIO, file)):
                number += 1
                yield {"shard": shard, "key": key, "record": record, "damage": damage}
    except (OSError, EOFError, tarfile.TarError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
        reason = str(error).strip().split("\n")[0].rstrip(".")
        damage = f"The shard cannot be read beyond its first {number} records: {reason}. Get the file again."
        yield {"shard": shard, "key": "end", "record": None, "damage": damage}


_Read = Iterator[tuple[str, Record | None, str]]
"""Key, record, and what is wrong with it (empty: nothing)."""


def _parquet_records(file: BinaryIO) -> _Read:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
    if "conversations" not in columns:
        raise ValueError(f"its columns are {', '.join(table.schema_arrow.names)}; a LLaVA record has 'conversations'")
    batches = table.iter_batches(batch_size=_ROWS, columns=columns)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows):
        yield str(number), row, ""


_ROWS = 32
"""Rows of a Parquet file that are decoded at a time."""


def _tar_records(file: BinaryIO) -> _Read:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        members = ((*_key_and_suffix(member.name), member) for member in archive if member.isfile())
        read = ((key, suffix, cast(Any, archive.extractfile(member)).read()) for key, suffix, member in members)
        for key, group in itertools.groupby(read, key=lambda one: one[0]):
            contents = {suffix: content for _, suffix, content in group}
            try:
                record, damage = _record_of_members(contents), ""
            except ValueError as error:
                record, damage = None, str(error)
            yield key, record, damage
        # tarfile takes the end of the file, and a damaged header, for the end of the archive: that is a block of zeros
        stream = cast(BinaryIO, archive.fileobj)
        if stream.tell() != archive.offset + tarfile.BLOCKSIZE or any(stream.read(_TAIL)):
            raise tarfile.ReadError("the archive is cut off, or the header of a member is damaged")


_TAIL = 2**20
"""Bytes after the end of a tar that are looked at: in a whole one they are zeros."""


def _key_and_suffix(name: str) -> tuple[str, str]:
    """``photos/000.0.jpg`` is the member ``0.jpg`` of ``photos/000``, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _record_of_members(contents: dict[str, bytes]) -> Record:
    """Join the JSON of a record and its media.

    Raises:
        ValueError: One is missing or of an unknown kind.
    """
    if "json" not in contents:
        raise ValueError(
            f"The record has the members {', '.join(sorted(contents))}, but no .json with its conversation."
        )
    try:
        record = json.loads(contents.pop("json"))
    except ValueError as error:
        raise ValueError(f"The .json of the record is damaged ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"The .json of the record holds a {type(record).__name__}, not an object.")
    for kind, (single, several) in MEDIA_KEYS.items():
        suffixes = [suffix for suffix in contents if suffix.rpartition(".")[2] in _MEDIA_SUFFIXES[kind]]
        media = [contents.pop(suffix) for suffix in sorted(suffixes, key=_natural)]
        named = next((record.pop(key) for key in (single, several) if record.get(key)), None)
        count = len(named) if isinstance(named, list) else int(named is not None)
        if named is not None and count != len(media):
            raise ValueError(f"The .json of the record names {count} {kind}s, but {len(media)} are beside it.")
        record[several] = media
    if contents:
        known = ", ".join(itertools.chain.from_iterable(_MEDIA_SUFFIXES.values()))
        raise ValueError(f"The record has the member .{min(contents)}, which is neither .json nor one of {known}.")
    return record


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


_READERS: dict[str, Callable[[BinaryIO], _Read]] = {".parquet": _parquet_records, ".tar": _tar_records}


def is_shard(name: str) -> bool:
    """Whether a file or address is one that can be streamed, by its ending."""
    return Path(name).suffix in _READERS


def _reader_of(shard: str) -> Callable[[BinaryIO], _Read]:
    suffix = Path(shard).suffix
    if suffix not in _READERS:
        raise ValueError(
            f"The shard {shard!r} ends with {suffix!r}; shards are read that end with {', '.join(_READERS)}."
        )
    return _READERS[suffix]


def find_shards(patterns: Iterable[str]) -> tuple[str, ...]:
    """Files and addresses that match some patterns (``data/*.parquet``), each once, in the order of their names.

    Raises:
        ValueError: A pattern matches nothing.
    """
    import fsspec

    found: set[str] = set()
    for pattern in patterns:
        system, path = fsspec.core.url_to_fs(pattern)
        matches = system.glob(path) if any(mark in path for mark in "*?[") else [path] * system.exists(path)
        if not matches:
            raise ValueError(f"No file matches {pattern!r}. Check the path; patterns are quoted on the command line.")
        found |= {match if "://" not in pattern else system.unstrip_protocol(match) for match in matches}
    return tuple(sorted(found))
