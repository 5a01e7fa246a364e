"""The training loop: steps, checkpoints, log. What is learned is a ``Task``.

The batch of a step is a function of the step alone, so a run that was killed at any moment goes on
from its last checkpoint exactly as it would have.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from llava_mini.training.checkpoints import (
    random_states,
    read_checkpoint,
    read_facts,
    restore_random_states,
    write_checkpoint,
)
from llava_mini.training.devices import Hardware, to_device
from llava_mini.training.interruption import Interruption
from llava_mini.training.optimizer import MasterAdamW, OptimizerSettings, rate_share
from llava_mini.training.prefetch import Prefetch
from llava_mini.training.run_log import RunLog
from llava_mini.training.stages import Stage, apply_stage

CHECKPOINT = "checkpoint.safetensors"
"""Name of the file that a phase goes on from."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a step has to make small."""

    total: Tensor
    """Scalar, with gradients."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named losses for the log."""
    right: dict[str, float] = field(default_factory=dict)
    """Named shares of right answers for the log, 0 to 1."""


class Task(Protocol):
    """What a phase learns."""

    @property
    def module(self) -> nn.Module:
        """Everything with parameters, heads that only training needs included."""
        ...

    @property
    def make_batch(self) -> Callable[[int], Any]:
        """Returns the batch of a step, which depends on the step alone. Can be pickled, without the module in it."""
        ...

    def losses(self, batch: Any) -> Losses:
        """Return the losses on a batch, which is on the device of the module."""
        ...


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One phase of a run."""

    name: str
    """Also the name of its folder."""
    num_steps: int
    stage: Stage
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint_seconds: float = 60.0
    """A checkpoint is written when so much time has passed since the last one, and at the end."""
    log_every: int = 20
    """Steps between two lines of the log."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"Phase {self.name!r} needs at least 1 step, got {self.num_steps}.")


def train_phase(
    task: Task,
    settings: PhaseSettings,
    folder: Path,
    log: RunLog,
    *,
    hardware: Hardware | None = None,
    interruption: Interruption | None = None,
    stop_after: int = -1,
) -> bool:
    """Train from the last checkpoint in ``folder``, or from the start, to the end of the phase or an interruption.

    Args:
        task: What to learn; its module is moved to the device and updated in place.
        settings: Steps, rules and rates.
        folder: Folder of the phase. Holds the checkpoint.
        log: Where measurements go.
        hardware: Where to train; one thread of the CPU if not given.
        interruption: Ends the phase early: after the step in progress, with a checkpoint.
        stop_after: Leave after this step without a checkpoint, as a kill would; negative: do not.

    Returns:
        Whether the phase is finished.

    Raises:
        ValueError: If the loss is not finite (the message names the step), the checkpoint belongs to
            another phase, or the rules do not fit the parameters.
        KeyboardInterrupt: After Ctrl-C, if the interruption takes it over.
        SystemExit: After SIGTERM, likewise.
    """
    hardware, interruption = hardware or Hardware(), interruption or Interruption()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    hardware.place(task.module)
    optimizer = MasterAdamW(apply_stage(task.module.named_parameters(), settings.stage), settings.optimizer)
    if not path.exists():
        _save(path, task.module, optimizer, settings, _Position())
    at = _resume(path, task.module, optimizer, settings)
    task.module.train()
    with (
        log.phase(settings.name, at.step, settings.num_steps) as progress,
        Prefetch(task.make_batch, end=settings.num_steps, workers=hardware.workers) as batches,
        interruption.deferred(),
    ):
        saved_at = time.monotonic()
        started_at = saved_at - at.seconds
        while at.step < settings.num_steps:
            losses = task.losses(to_device(batches(at.step), hardware.device))
            total = float(losses.total.detach())
            if not math.isfinite(total):
                raise ValueError(
                    f"The loss of phase {settings.name!r} is {total} at step {at.step}. The last good state is in "
                    f"{path}. Lower the learning rates of the stage, or look at the data of this step."
                )
            losses.total.backward()
            share = rate_share(at.step, settings.num_steps, settings.optimizer)
            norm = optimizer.step(share)
            at.advance({"loss": total, **losses.parts}, losses.right, time.monotonic() - started_at)
            finished = at.step == settings.num_steps
            if at.step % settings.log_every == 0 or finished:
                seconds, means = at.seconds / at.step, at.take_means()
                log.write(
                    phase=settings.name, step=at.step, rate_share=share, gradient_norm=norm, seconds=seconds, **means
                )
            progress(at.step, at.seconds, {"loss": total})
            if at.step == stop_after:
                return False
            ends = finished or interruption.is_due(2 * (at.saving_seconds + at.seconds / at.step))
            if ends or time.monotonic() - saved_at > settings.checkpoint_seconds:
                _save(path, task.module, optimizer, settings, at)
                saved_at = time.monotonic()
            if ends:
                break
    task.module.eval()
    return at.step == settings.num_steps


def progress_of(folder: Path) -> tuple[int, float]:
    """Return how many steps the checkpoint in ``folder`` has seen, and the seconds they took; 0 without one."""
    path = folder / CHECKPOINT
    facts = read_facts(path) if path.exists() else {}
    return int(facts.get("step", 0)), float(facts.get("seconds", 0.0))


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load the weights of the checkpoint in ``folder`` into the module that was trained."""
    tensors, _ = read_checkpoint(folder / CHECKPOINT)
    _load_module(module, tensors)


@dataclass
class _Position:
    """How far a phase is, and what was measured since the last line of the log."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time they took, over all starts; steps that were lost and run again are counted once."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sum and number of each measured value."""
    sums_right: dict[str, list[float]] = field(default_factory=dict)
    saving_seconds: float = 1.0
    """What the last checkpoint took to write."""

    def advance(self, values: Mapping[str, float], right: Mapping[str, float], seconds: float) -> None:
        self.step += 1
        self.seconds = seconds
        for sums, measured in ((self.sums, values), (self.sums_right, right)):
            for name, value in measured.items():
                before, number = sums.get(name, (0.0, 0))
                sums[name] = [before + value, number + 1]

    def take_means(self) -> dict[str, Any]:
        """Return the means of what was measured, those of right answers under ``right``, and begin anew."""
        means, right = (
            {name: total / number for name, (total, number) in sums.items()} for sums in (self.sums, self.sums_right)
        )
        self.sums, self.sums_right = {}, {}
        return {**means, "right": right} if right else means


def _save(path: Path, module: nn.Module, optimizer: MasterAdamW, settings: PhaseSettings, at: _Position) -> None:
    started_at = time.monotonic()
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    tensors |= {f"random.{name}": value for name, value in random_states().items()}
    facts = {"phase": settings.name, "num_steps": settings.num_steps, "step": at.step, "seconds": at.seconds}
    write_checkpoint(path, tensors, {**facts, "sums": at.sums, "sums_right": at.sums_right})
    at.saving_seconds = time.monotonic() - started_at


def _resume(path: Path, module: nn.Module, optimizer: MasterAdamW, settings: PhaseSettings) -> _Position:
    tensors, facts = read_checkpoint(path)
    expected = {"phase": settings.name, "num_steps": settings.num_steps}
    found = {name: facts.get(name) for name in expected}
    if found != expected:
        raise ValueError(f"{path} holds {found} but this run has {expected}. Give another folder, or remove the file.")
    _load_module(module, tensors)
    optimizer.restore(_part(tensors, "optimizer."))
    restore_random_states(_part(tensors, "random."))
    return _Position(step=facts["step"], seconds=facts["seconds"], sums=facts["sums"], sums_right=facts["sums_right"])


def _load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(_part(tensors, "module."))


def _part(tensors: Mapping[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {name.removeprefix(beginning): value for name, value in tensors.items() if name.startswith(beginning)}
