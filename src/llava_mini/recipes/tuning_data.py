"""What a stage learns from: files, whose records are known before it starts, or a stream, whose records are not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.order import BatchOrder
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import Sample
from llava_mini.data.stream_batches import StreamBatches
from llava_mini.data.streaming import SampleStream, StreamSettings, find_shards, is_shard
from llava_mini.data.tuning_batch import TuningBatches, TuningCollator
from llava_mini.training.instruction import MakeBatch

Value = TypeVar("Value")


class TuningData(Protocol):
    """Samples, and how they become the micro-batches of a stage."""

    @property
    def num_samples(self) -> int | None:
        """Of an epoch. None: not known."""
        ...

    @property
    def num_batches(self) -> int | None:
        """Micro-batches of an epoch. None: not known."""
        ...

    @property
    def in_words(self) -> str:
        """How much there is."""
        ...

    @property
    def facts(self) -> dict[str, object]:
        """What decides which samples come when, as plain values for JSON."""
        ...

    def some(self, number: int) -> Iterable[Sample | Damaged]:
        """Return at most so many samples that stand for all."""
        ...

    def batches(self, collator: TuningCollator, places: Path | None) -> MakeBatch:
        """Return the micro-batches.

        Args:
            collator: From samples to tensors.
            places: A folder for what a stream needs to go on. None: it reads all from the beginning.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FileData:
    """Records of files, in micro-batches of one kind and similar length."""

    files: tuple[DataFile, ...]
    batch_size: int
    """Samples of a micro-batch."""
    micro_batches: int
    """Of a step. They are of one kind, so that no device waits for another."""
    seed: int

    @cached_property
    def mixture(self) -> Mixture:
        """All records."""
        return Mixture(self.files)

    @cached_property
    def order(self) -> BatchOrder:
        """Which samples a micro-batch holds."""
        return BatchOrder(self.mixture, batch_size=self.batch_size, seed=self.seed, alike=self.micro_batches)

    @property
    def num_samples(self) -> int:
        """Of an epoch."""
        return self.order.num_samples

    @property
    def num_batches(self) -> int:
        """Micro-batches of an epoch."""
        return self.order.num_batches

    @property
    def in_words(self) -> str:
        """How much there is."""
        return f"{self.num_samples} samples an epoch"

    @property
    def facts(self) -> dict[str, object]:
        """What decides which samples come when."""
        return {"files": [str(file.path) for file in self.files], "order": self.order.fingerprint}

    def some(self, number: int) -> Iterable[Sample | Damaged]:
        """Return samples that are evenly spread."""
        chosen = np.unique(np.linspace(0, len(self.mixture) - 1, number).round().astype(int))
        return (self.mixture.sample(int(index)) for index in chosen)

    def batches(self, collator: TuningCollator, places: Path | None) -> TuningBatches:
        """Return the micro-batches; they need no places."""
        return TuningBatches(samples=self.mixture, order=self.order, collator=collator)


@dataclass(frozen=True, kw_only=True)
class StreamData:
    """Records of shards, in micro-batches of what is alike among neighbours."""

    stream: StreamSettings
    batch_size: int
    """Samples of a micro-batch."""
    micro_batches: int
    """Of a step."""

    @property
    def num_samples(self) -> None:
        """Not known."""

    @property
    def num_batches(self) -> None:
        """Not known."""

    @property
    def in_words(self) -> str:
        """How much there is."""
        return f"a stream of {len(self.stream.shards)} shards"

    @property
    def facts(self) -> dict[str, object]:
        """What decides which samples come when."""
        return {"files": list(self.stream.shards), "order": self.stream.fingerprint}

    def some(self, number: int) -> Iterable[Sample | Damaged]:
        """Return the first samples, of no more records than that."""
        return islice(SampleStream(replace(self.stream, window=min(self.stream.window, number))), number)

    def batches(self, collator: TuningCollator, places: Path | None) -> StreamBatches:
        """Return the micro-batches."""
        return StreamBatches(
            self.stream, collator, batch_size=self.batch_size, micro_batches=self.micro_batches, places=places
        )


def find_data(
    names: Sequence[str],
    media: Sequence[Path] = (),
    weights: Sequence[float] = (),
    seed: int = 0,
    window: int | None = None,
) -> tuple[tuple[DataFile, ...], StreamSettings | None]:
    """Return the files or the stream that were named.

    Args:
        names: JSON and JSONL files; or shards, which may be addresses and patterns.
        media: Folders where paths start: one for all, or one for each file. Empty: the folder of each file, and none
            for a stream, whose records hold their media.
        weights: One for all files, or one for each. Empty: 1.
        seed: Of the order of a stream.
        window: Of a stream. None: as it is by default.

    Raises:
        ValueError: Files come with shards, a stream has weights or several folders, files have a window, there are
            neither one nor as many folders or weights as files, or something is missing.
    """
    for folder in media:
        if not folder.is_dir():
            raise ValueError(
                f"There is no folder {str(folder)!r}. Give the folder where the paths in the records start."
            )
    shards = [name for name in names if is_shard(name)]
    if not shards:
        if window is not None:
            raise ValueError("A window is of shards: records of files are all known before the training. Leave it out.")
        folders = _for_each(names, media, None, "media folders")
        each = zip(names, folders, _for_each(names, weights, 1.0, "weights"), strict=True)
        files = (DataFile(path=Path(name), media_folder=folder, weight=weight) for name, folder, weight in each)
        return tuple(files), None
    if len(shards) < len(names):
        other = next(name for name in names if name not in shards)
        raise ValueError(f"The file {other!r} came with the shard {shards[0]!r}. Give files or shards, not both.")
    if weights or len(media) > 1:
        raise ValueError(
            f"Shards came with {len(weights)} weights and {len(media)} media folders. They are read as they come, with "
            "at most one folder. Write shards in which the sources are mixed as they should be."
        )
    folder = media[0] if media else None
    stream = StreamSettings(shards=find_shards(shards), name="stream", media_folder=folder, seed=seed)
    return (), stream if window is None else replace(stream, window=window)


def _for_each(names: Sequence[str], given: Sequence[Value], default: Value, what: str) -> Sequence[Value]:
    """One value for each file."""
    if len(given) not in (0, 1, len(names)):
        raise ValueError(
            f"{len(names)} data files came with {len(given)} {what}. Give one for all of them, or one for each."
        )
    return given if len(given) == len(names) else [*given, default][:1] * len(names)
