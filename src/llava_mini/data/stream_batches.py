"""The micro-batches of a run over a stream by number.

The stream is dealt to lanes, and micro-batch ``i`` is the next one of lane ``i % lanes``. How many lanes there are
follows from the shards and from the micro-batches of a step, never from the processes: a micro-batch depends on its
number alone, as it does with files, so any number of processes learns from the same ones and goes on with them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import Sample
from llava_mini.data.streaming import SampleStream, StreamSettings
from llava_mini.data.tuning_batch import TuningBatch, TuningCollator

PLACES_EVERY = 50
"""Micro-batches of a lane between two places that are written down."""
_FRUITLESS_EPOCHS = 2
"""A lane that finds no record in so many epochs one after the other has none."""


class StreamBatches:
    """What a task gives the trainer as ``make_batch``. Can be pickled.

    Asked for in order, micro-batches are read in order. A run that goes on finds the last place before its micro-batch
    that was written down, and reads on from there without decoding. Lanes that are not asked for are not opened.
    """

    def __init__(
        self,
        settings: StreamSettings,
        collator: TuningCollator,
        *,
        batch_size: int,
        micro_batches: int = 1,
        places: Path | None = None,
    ) -> None:
        """Begin at the first micro-batch. Nothing is read yet.

        Args:
            settings: Of the stream. Its window is divided among the lanes, each of which has one micro-batch at least.
            collator: Makes batches of its samples.
            batch_size: Most samples of a micro-batch; the last ones of a shard have less.
            micro_batches: Of a step, on all processes together. The number of lanes is the greatest that divides both
                these and the shards: each lane gets as many shards as any other.
            places: A folder where places are written down. None: going on reads all from the beginning.

        Raises:
            ValueError: A number is less than 1.
        """
        for name, value in (("batch_size", batch_size), ("micro_batches", micro_batches)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        self.collator = collator
        self.fingerprint = f"{settings.fingerprint} {batch_size} {micro_batches}"
        """Equal for the same samples in the same order: what a run that goes on compares."""
        num_lanes = gcd(micro_batches, len(settings.shards))
        share = replace(settings, window=max(settings.window // num_lanes // batch_size, 1) * batch_size)
        self._lanes = [
            _Lane(
                SampleStream(share, rank=lane, world_size=num_lanes, batch_size=batch_size),
                None if places is None else places / f"{lane}.jsonl",
            )
            for lane in range(num_lanes)
        ]

    def __call__(self, index: int) -> TuningBatch:
        """Return micro-batch ``index``, counted over the whole run.

        Raises:
            ValueError: The stream holds nothing for its lane, or places are of another order or size.
        """
        number, lane = divmod(index, len(self._lanes))
        return self.collator(self._lanes[lane].items(number))


class _Lane:
    """What the micro-batches of a lane hold, counted from 0."""

    def __init__(self, stream: SampleStream, places: Path | None) -> None:
        self._stream, self._places = stream, places
        self._beginning = stream.state_dict()
        self._is_open = False
        self._number = 0
        """Of the micro-batch that is read next."""
        self._rest: Iterator[list[Sample | Damaged]] = iter(())
        """Of the epoch."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_open": False, "_rest": iter(())}

    def items(self, number: int) -> list[Sample | Damaged]:
        """Return what micro-batch ``number`` holds."""
        if number < self._number or not self._is_open:
            self._go_to(number)
        while self._number < number:
            self._read()
        return self._read()

    def _read(self) -> list[Sample | Damaged]:
        """The next micro-batch. Damage that stands alone joins the one behind it, for alone it teaches nothing."""
        if self._number and self._number % PLACES_EVERY == 0:
            self._write_place()
        items: list[Sample | Damaged] = []
        fruitless = -1  # what is left of the present epoch may be nothing
        while len(items) < self._stream.batch_size and not any(isinstance(item, Sample) for item in items):
            found = next(self._rest, [])
            items += found
            fruitless = 0 if found else fruitless + 1
            if fruitless > _FRUITLESS_EPOCHS:
                raise ValueError(
                    f"Lane {self._stream.rank} of {self._stream.world_size} of the stream found no record in "
                    f"{_FRUITLESS_EPOCHS} epochs. Are shards empty? Leave these out."
                )
            if not found:
                self._rest = self._stream.batches()
        self._number += 1
        return items

    def _go_to(self, number: int) -> None:
        """Go to the last place known that a micro-batch does not lie before."""
        known = [(0, self._beginning), *self._written()]
        self._number, state = max((place for place in known if place[0] <= number), key=lambda place: place[0])
        self._stream.load_state_dict(state)
        self._is_open, self._rest = True, iter(())

    def _write_place(self) -> None:
        if self._places is None:
            return
        self._places.parent.mkdir(parents=True, exist_ok=True)
        place = {"number": self._number, "state": self._stream.state_dict()}
        with self._places.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(place)}\n")

    def _written(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The places that earlier starts and other processes wrote down."""
        if self._places is None or not self._places.exists():
            return
        for line in self._places.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                place = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill: the place before it does as well
                continue
            yield place["number"], place["state"]
