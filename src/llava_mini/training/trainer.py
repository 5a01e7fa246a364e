"""The training loop: steps, checkpoints, log. What is learned is a ``Task``; who computes it, a ``World``.

Micro-batches are numbered over the whole run, and each depends on its number alone. A step takes the next
``accumulate * world.size`` of them, so it learns from the same samples however they are spread over processes, and a
run that was killed at any moment goes on from its last checkpoint exactly as it would have.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from llava_mini.data.quarantine import QuarantineLog
from llava_mini.training.devices import Hardware, fuse_attention, to_device
from llava_mini.training.frozen import FROZEN, frozen_digests
from llava_mini.training.interruption import Interruption
from llava_mini.training.measures import Losses as Losses
from llava_mini.training.measures import Measured, Position, Share, means
from llava_mini.training.optimizer import MasterAdamW, OptimizerSettings, rate_share
from llava_mini.training.prefetch import Prefetch
from llava_mini.training.run_log import Progress, RunLog
from llava_mini.training.sharding import EngineSettings, prepare, set_accumulating
from llava_mini.training.stages import Stage, apply_stage
from llava_mini.training.stores import load_weights as load_weights
from llava_mini.training.stores import progress_of as progress_of
from llava_mini.training.stores import store_of
from llava_mini.training.world import World

QUARANTINE = "quarantine.jsonl"
"""Name of the list of samples that were left out, in the folder of a phase."""

NAMED_SAMPLES = 20
"""Most samples that an error names."""

OTHER_RATES = "Lower the learning rates of the stage, or look at the data of this step."

Batch = TypeVar("Batch")


class Task(Protocol):
    """What a phase learns."""

    @property
    def module(self) -> nn.Module:
        """Everything with parameters, heads that only training needs included."""
        ...

    @property
    def make_batch(self) -> Callable[[int], Any]:
        """Returns the micro-batch of a number. Can be pickled, without the module in it.

        It may have a ``fingerprint``, which is equal for equal data in equal order: a run goes on with no other. A
        micro-batch may have ``ids`` and ``damaged``: names of the samples in it, and those that were left out.
        """
        ...

    def losses(self, batch: Any) -> Losses:
        """Return the losses on a micro-batch, which is on the device of the module.

        Each is a mean over what the micro-batch weighs; where that is nothing, they are finite all the same.
        """
        ...


@runtime_checkable
class WeighingTask(Task, Protocol):
    """A task whose micro-batches count differently. Without weights, all count alike."""

    def weight(self, batch: Any) -> float:
        """Return how much a micro-batch counts, before it is computed: the number of its supervised tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One phase of a run."""

    name: str
    """Also the name of its folder."""
    num_steps: int
    stage: Stage
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    accumulate: int = 1
    """Micro-batches of a step in each process."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How it is computed."""
    checkpoint_seconds: float = 60.0
    """A checkpoint is written when so much time has passed since the last one, and at the end."""
    keep_last: int | None = None
    """How many checkpoints stay, each a folder that any number of processes goes on from. None: one file, which every
    checkpoint replaces; for one process with a small model."""
    max_damaged_share: float = 0.01
    """Largest share of samples that may be left out because they are damaged, 0 to 1."""
    log_every: int = 20
    """Steps between two lines of the log."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"Phase {self.name!r} needs at least 1 step, got {self.num_steps}.")
        if self.accumulate < 1 or (self.keep_last is not None and self.keep_last < 1):
            raise ValueError(
                f"accumulate and keep_last must be at least 1, got {self.accumulate} and {self.keep_last}."
            )


def train_phase(
    task: Task,
    settings: PhaseSettings,
    folder: Path,
    log: RunLog,
    *,
    hardware: Hardware | None = None,
    interruption: Interruption | None = None,
    world: World | None = None,
    stop_after: int = -1,
) -> bool:
    """Train from the last checkpoint in ``folder``, or from the start, to the end of the phase or an interruption.

    With several processes, all of them call this with the same arguments, and end it in the same way.

    Args:
        task: What to learn; its module is moved to the device and updated in place. Built anew, what does not train in
            it is the same: checkpoints hold the rest alone.
        settings: Steps, rules and rates.
        folder: Folder of the phase, which all processes share. Holds checkpoints.
        log: Where measurements go; that of the first process alone is used.
        hardware: Where to train; one thread of the CPU if not given.
        interruption: Ends the phase early: after the step in progress, with a checkpoint.
        world: The processes, and the device of this one. None: it trains alone, on the device of ``hardware``.
        stop_after: Leave after this step without a checkpoint, as a kill would; negative: do not.

    Returns:
        Whether the phase is finished.

    Raises:
        ValueError: If the loss is zero, the loss or the gradient is not finite, or a step supervises nothing (the
            message names step and samples), too many samples are damaged, the checkpoint belongs to another phase,
            other data or other frozen weights, the processes read different data, or the rules do not fit the
            parameters.
        OSError: If a checkpoint could not be written. Those before it are whole.
        ChildProcessError: If another process of the run has ended.
        KeyboardInterrupt: After Ctrl-C, if the interruption takes it over.
        SystemExit: After SIGTERM, likewise.
    """
    hardware, interruption = hardware or Hardware(), interruption or Interruption()
    world = world or World(device=hardware.device)
    with world.guarded():
        phase = _Phase(task, settings, folder, replace(hardware, device=world.device), world)
        return phase.run(log, interruption, stop_after)


@dataclass(frozen=True, kw_only=True)
class _BatchesOfRank(Generic[Batch]):
    """The micro-batches of one process, counted from 0."""

    make: Callable[[int], Batch]
    rank: int
    size: int

    def __call__(self, number: int) -> Batch:
        return self.make(number * self.size + self.rank)


class _Phase:
    """A phase while it is trained."""

    def __init__(self, task: Task, settings: PhaseSettings, folder: Path, hardware: Hardware, world: World) -> None:
        self.task, self.settings, self.hardware, self.world = task, settings, hardware, world
        self._batches: list[Any] = []
        """Micro-batches of the step in progress."""
        self._weights: list[float] = []
        """Of each of them."""
        self._weigh = task.weight if isinstance(task, WeighingTask) else None
        self.data = self._agreed_data()
        self.store = store_of(folder, settings.keep_last, world)
        self.store.open()
        self.frozen = world.first(self._frozen)  # while the weights are whole, and as they were built
        if world.size == 1:
            hardware.place(task.module)
        elif world.device.type == "cuda":
            fuse_attention(task.module)
        self.forward = prepare(task, settings.stage, settings.engine, world)
        self.optimizer = MasterAdamW(apply_stage(task.module.named_parameters(), settings.stage), settings.optimizer)
        if world.rank:
            torch.manual_seed((torch.initial_seed() + world.rank) % 2**63)  # or all would drop out the same
        path = folder / QUARANTINE if world.is_first else None
        logs = world.each(lambda: QuarantineLog(path, max_share=settings.max_damaged_share))  # all fail if one does
        self.quarantine = logs[world.rank]
        self.at = Position()
        facts = self.store.resume(task.module, self.optimizer, self._facts())
        self.at = Position.from_facts(facts)
        self.quarantine.num_samples, self.quarantine.num_damaged = facts["samples"], facts["damaged"]

    def run(self, log: RunLog, interruption: Interruption, stop_after: int) -> bool:
        settings, at = self.settings, self.at
        self.task.module.train()
        make = _BatchesOfRank(make=self.task.make_batch, rank=self.world.rank, size=self.world.size)
        with (
            log.phase(settings.name, at.step, settings.num_steps) if self.world.is_first else nullcontext() as progress,
            Prefetch(
                make,
                end=settings.num_steps * settings.accumulate,
                workers=self.hardware.workers,
                ahead=settings.accumulate,
            ) as batches,
            interruption.deferred(),
            self.world.guarded(),  # in here: whoever ends all processes because of one waits until the cause is known
        ):
            saved_at = time.monotonic()
            started_at = saved_at - at.seconds
            while at.step < settings.num_steps:
                first = at.step * settings.accumulate
                shares = self._draw(lambda number, first=first: batches(first + number))
                measured = self._compute(shares)
                seconds = time.monotonic() - started_at
                measured.ends = interruption.is_due(2 * (at.saving_seconds + seconds / (at.step + 1)))
                measured.saves = time.monotonic() - saved_at > settings.checkpoint_seconds
                gathered = self.world.gather(measured)
                losses, right = self._checked(gathered, shares)
                share = rate_share(at.step, settings.num_steps, settings.optimizer)
                norm = self._update(share, shares)
                at.advance(losses, right, time.monotonic() - started_at)
                finished = at.step == settings.num_steps
                if self.world.is_first:
                    self._report(log, progress, share, norm, losses["loss"])
                if at.step == stop_after:
                    return False
                ends = finished or any(one.ends for one in gathered)
                if ends or gathered[0].saves:
                    started_saving = time.monotonic()
                    self.store.save(self.task.module, self.optimizer, self._facts())
                    saved_at = time.monotonic()
                    at.saving_seconds = saved_at - started_saving
                if ends:
                    break
        self.task.module.eval()
        return at.step == settings.num_steps

    def _draw(self, batch_of: Callable[[int], Any]) -> list[Share]:
        """Make the micro-batches of this process, and return what all processes bring to the step."""

        def draw() -> Share:
            self._batches = [batch_of(number) for number in range(self.settings.accumulate)]
            self._weights = [self._weight(batch) for batch in self._batches]
            return Share(
                weight=math.fsum(self._weights),
                ids=_ids_of(self._batches),
                damaged=tuple(one for batch in self._batches for one in getattr(batch, "damaged", ())),
            )

        shares = self.world.each(draw)
        damaged = [one for share in shares for one in share.damaged]
        num_samples = len(damaged) + sum(len(share.ids) for share in shares)
        if damaged:
            self.world.each(lambda: self.quarantine.add(damaged, num_samples=num_samples))
        else:
            self.quarantine.add((), num_samples=num_samples)
        self.quarantine.check()
        if not math.fsum(share.weight for share in shares) > 0:
            if len(damaged) == num_samples:
                raise ValueError(
                    f"All {num_samples} samples of step {self.at.step} of phase {self.settings.name!r} are damaged; "
                    f"{QUARANTINE} in its folder lists them. The first is {damaged[0]}"
                )
            raise ValueError(
                f"Step {self.at.step} of phase {self.settings.name!r} supervises nothing: no sample has an answer to "
                f"learn{_named(_ids_in(shares))}. Look at the labels of these samples."
            )
        return shares

    def _compute(self, shares: list[Share]) -> Measured:
        """Add up the gradients of the micro-batches of this process, as their shares of the step."""
        total_weight = math.fsum(share.weight for share in shares)
        measured, last = Measured(), self.settings.accumulate - 1
        for number, (batch, weight) in enumerate(zip(self._batches, self._weights, strict=True)):
            set_accumulating(self.forward, self.settings.engine.strategy, is_last=number == last)
            loss = self.forward(to_device(batch, self.hardware.device))
            # Gradients are averaged over processes, so each counts as many times as there are.
            (loss * (weight * self.world.size / total_weight)).backward()
            self.optimizer.collect()
            total = float(loss.detach())
            measured.add(self.forward.losses, total, weight)
            if not math.isfinite(total):
                measured.bad += _ids_of([batch])
        self.forward.losses, self._batches = None, []
        return measured

    def _checked(self, gathered: list[Measured], shares: list[Share]) -> tuple[dict[str, float], dict[str, float]]:
        """Return losses and shares of right answers of the step over all processes.

        Raises:
            ValueError: If the loss is zero or not finite. No weight has changed.
        """
        losses = means([one.losses for one in gathered])
        loss, bad = losses["loss"], [one.bad for one in gathered if one.bad]
        if not math.isfinite(loss) or bad:
            raise self._failure("The loss", loss, bad or _ids_in(shares), OTHER_RATES)
        if loss == 0:
            advice = "Nothing is answered so exactly: look at the labels, and at what the task computes."
            raise self._failure("The loss", loss, _ids_in(shares), advice)
        return losses, means([one.right for one in gathered])

    def _update(self, share: float, shares: list[Share]) -> float:
        """Update what trains, and return the length of the gradient.

        Raises:
            ValueError: If that is not finite. No weight has changed.
        """
        norm = self.optimizer.step(share)
        if not math.isfinite(norm):
            raise self._failure("The length of the gradient", norm, _ids_in(shares), OTHER_RATES)
        return norm

    def _failure(self, what: str, value: float, ids: Iterable[tuple[str, ...]], advice: str) -> ValueError:
        return ValueError(
            f"{what} of phase {self.settings.name!r} is {value} at step {self.at.step}{_named(ids)}. "
            f"{self.store.last_good} {advice}"
        )

    def _report(self, log: RunLog, progress: Progress | None, share: float, norm: float, loss: float) -> None:
        settings, at, quarantine = self.settings, self.at, self.quarantine
        if at.step % settings.log_every == 0 or at.step == settings.num_steps:
            damaged = {"damaged": quarantine.num_damaged} if quarantine.num_damaged else {}
            log.write(
                phase=settings.name,
                step=at.step,
                rate_share=share,
                gradient_norm=norm,
                seconds=at.seconds / at.step,
                **damaged,
                **at.take_means(),
            )
        if quarantine.num_damaged:
            log.warn(f"Some samples are damaged and left out: {quarantine.path} lists them.")
        assert progress is not None
        progress(at.step, at.seconds, {"loss": loss})

    def _weight(self, batch: Any) -> float:
        return float(self._weigh(batch)) if self._weigh else 1.0

    def _facts(self) -> dict[str, Any]:
        return {
            "phase": self.settings.name,
            "num_steps": self.settings.num_steps,
            "micro_batches": self.settings.accumulate * self.world.size,
            "data": self.data,
            FROZEN: self.frozen,
            **self.at.to_facts(),
            "samples": self.quarantine.num_samples,
            "damaged": self.quarantine.num_damaged,
        }

    def _frozen(self) -> dict[str, str]:
        module, stage = self.task.module, self.settings.stage
        return frozen_digests(
            module, {f"module.{name}" for name, _ in module.named_parameters() if stage.rate_of(name)}
        )

    def _agreed_data(self) -> str:
        """Return what tells the data from other data; empty if the task does not say.

        Raises:
            ValueError: If the processes have different data.
        """
        found = self.world.gather(getattr(self.task.make_batch, "fingerprint", ""))
        if others := [rank for rank, one in enumerate(found) if one != found[0]]:
            raise ValueError(
                f"Rank {others[0]} reads other data than rank 0, or in another order. Give all machines of the run the "
                "same data files."
            )
        return found[0]


def _ids_of(batches: Iterable[Any]) -> tuple[str, ...]:
    return tuple(name for batch in batches for name in getattr(batch, "ids", ()))


def _ids_in(shares: Iterable[Share]) -> list[tuple[str, ...]]:
    return [share.ids for share in shares]


def _named(ids: Iterable[tuple[str, ...]]) -> str:
    """Return the names of some samples in brackets, nothing if there are none."""
    names = [name for part in ids for name in part]
    more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
    return f" (samples {', '.join(names[:NAMED_SAMPLES])}{more})" if names else ""
