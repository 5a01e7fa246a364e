"""Which samples a micro-batch holds: a pure function of a seed and the number of the micro-batch.

So a run that was killed in the middle of an epoch goes on with the same samples in the same order, whatever the number
of processes that make batches.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llava_mini.data.samples import KINDS, Kind

_EPOCHS_KEPT = 2
"""Batches are made ahead, so the end of one epoch and the beginning of the next are asked for by turns."""


class Outlined(Protocol):
    """What the order depends on: a ``Mixture`` has it."""

    kinds: np.ndarray
    """[N]: what each sample shows, as its place in ``samples.KINDS``."""
    lengths: np.ndarray
    """[N]: how long it is, in any unit."""
    first: np.ndarray
    """[files + 1]: number of the first sample of each file, and N."""

    @property
    def weights(self) -> Sequence[float]:
        """How often samples of each file are seen in an epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    samples: np.ndarray
    starts: np.ndarray
    """[batches]: where each micro-batch begins in ``samples``."""
    stops: np.ndarray


class BatchOrder:
    """The micro-batches of a run.

    A micro-batch holds samples of one kind and of similar length, so that little is padding and text does not wait for
    films. In each epoch every sample is seen as often as the weight of its file says: with weight 1 once, with 2 twice;
    with 0.5 half of the samples of each kind, the other half in the next epoch. Micro-batches of a kind differ by at
    most one in size, so the number of micro-batches is the same in every epoch.
    """

    def __init__(
        self,
        samples: Outlined,
        *,
        batch_size: int | Mapping[Kind, int],
        seed: int,
        alike: int = 1,
        pool: int = 32,
    ) -> None:
        """Make an order.

        Args:
            samples: What is to be ordered; only its arrays are kept.
            batch_size: Most samples of a micro-batch, for all kinds or for each: a film has many frames, and each of
                them takes the memory of an image.
            seed: From 0 on.
            alike: So many consecutive micro-batches are of one kind and similar length. With the number of ranks, none
                waits for another that has more to do.
            pool: So many micro-batches' worth of samples, drawn at random, are sorted by length together, at most a
                quarter of those of a kind. More: less padding, and the same samples meet more often.

        Raises:
            ValueError: A number is too small, or a kind has no size.
        """
        sizes = dict.fromkeys(KINDS, batch_size) if isinstance(batch_size, int) else dict(batch_size)
        for name, value in {
            "alike": alike,
            "pool": pool,
            **{f"batch_size of {k}": v for k, v in sizes.items()},
        }.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more.")
        self.seed = seed
        self.alike = alike
        self.pool = pool
        self.kinds = np.asarray(samples.kinds)
        self.lengths = np.asarray(samples.lengths)
        self.first = np.asarray(samples.first)
        self.weights = tuple(samples.weights)
        self.batch_sizes = sizes
        if len(self.kinds) == 0:
            raise ValueError("There are no samples to put into an order.")
        missing = [kind for number, kind in enumerate(KINDS) if kind not in sizes and (self.kinds == number).any()]
        if missing:
            raise ValueError(
                f"There are samples of kind {missing[0]!r}, but batch_size is for {', '.join(sizes)} only."
            )
        counts = [sum(self._drawn(*cell) for cell in self._cells(kind)) for kind in range(len(KINDS))]
        self.num_samples = sum(counts)
        """Samples of an epoch; one with weight 2 counts twice."""
        self.num_batches = sum(self._num_batches(kind, count) for kind, count in enumerate(counts))
        """Micro-batches of an epoch."""
        self._epochs: dict[int, _Epoch] = {}

    @property
    def fingerprint(self) -> str:
        """Equal for equal orders of equally many samples."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.seed, self.alike, self.pool, self.weights, sorted(self.batch_sizes.items()))).encode())
        for values in (self.kinds, self.lengths, self.first):
            digest.update(values.tobytes())
        return digest.hexdigest()

    def batches(self, index: int) -> tuple[int, ...]:
        """Return the samples of a micro-batch.

        Args:
            index: From 0 on, counted over the whole run.
        """
        if index < 0:
            raise ValueError(f"There is no micro-batch {index}; they are counted from 0.")
        number, place = divmod(index, self.num_batches)
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._make(number)
            self._epochs = {**dict(list(self._epochs.items())[1 - _EPOCHS_KEPT :]), number: epoch}
        return tuple(epoch.samples[epoch.starts[place] : epoch.stops[place]].tolist())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def _cells(self, kind: int) -> list[tuple[int, np.ndarray]]:
        """The samples of a kind in each file that has any."""
        spans = [np.flatnonzero(self.kinds[start:stop] == kind) + start for start, stop in self._spans()]
        return [(source, samples) for source, samples in enumerate(spans) if len(samples)]

    def _spans(self) -> list[tuple[int, int]]:
        return list(zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True))

    def _drawn(self, source: int, samples: np.ndarray) -> int:
        """How many samples of a cell an epoch has: at least one."""
        return max(round(self.weights[source] * len(samples)), 1)

    def _num_batches(self, kind: int, count: int) -> int:
        """As few as hold the samples, in a multiple of ``alike`` where there are so many samples."""
        if not count:
            return 0
        together = self.batch_sizes[KINDS[kind]] * self.alike
        return min(-(-count // together) * self.alike, count)

    def _draw(self, epoch: int, kind: int, source: int, samples: np.ndarray) -> np.ndarray:
        """The samples of a cell in an epoch: all of them as often as goes, and of the rest a window that moves on."""
        total = len(samples)
        whole, rest = divmod(self._drawn(source, samples), total)
        fixed = np.random.default_rng([self.seed, 1, source, kind]).permutation(samples)
        window = np.arange(epoch * rest, (epoch + 1) * rest) % total
        return np.concatenate([*[samples] * whole, fixed[window]])

    def _make(self, number: int) -> _Epoch:
        generator = np.random.default_rng([self.seed, 0, number])
        samples, blocks, offset = [], [], 0
        for kind in range(len(KINDS)):
            cells = self._cells(kind)
            if not cells:
                continue
            drawn = generator.permutation(np.concatenate([self._draw(number, kind, *cell) for cell in cells]))
            num_batches = self._num_batches(kind, len(drawn))
            pool = max(min(self.pool, num_batches // 4), 1)
            samples.append(self._by_length(drawn, self.batch_sizes[KINDS[kind]] * pool))
            edges = np.arange(num_batches + 1) * len(drawn) // num_batches + offset
            bounds = np.stack([edges[:-1], edges[1:]], axis=1)  # [batches, 2]
            blocks += [bounds[start : start + self.alike] for start in range(0, num_batches, self.alike)]
            offset += len(drawn)
        shuffled = [blocks[place] for place in generator.permutation(len(blocks))]
        shuffled.sort(key=lambda block: len(block) < self.alike)  # incomplete ones last, or they would shift the others
        bounds = np.concatenate(shuffled)
        return _Epoch(samples=np.concatenate(samples), starts=bounds[:, 0], stops=bounds[:, 1])

    def _by_length(self, samples: np.ndarray, pool: int) -> np.ndarray:
        """Sort each pool by length, by turns up and down, so that lengths do not jump where pools meet."""
        pools = np.arange(len(samples)) // pool
        lengths = self.lengths[samples].astype(np.int64)
        return samples[np.lexsort((np.where(pools % 2, -lengths, lengths), pools))]
