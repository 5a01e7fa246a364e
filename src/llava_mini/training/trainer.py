"""The training loop: steps, checkpoints, log. What is learned is a ``Task``.

The batch of a step is a function of the step alone, so a run that was killed at any moment goes on
from its last checkpoint exactly as it would have.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llava_mini.training.checkpoints import random_state, read_checkpoint, write_checkpoint
from llava_mini.training.optimizer import MasterAdamW, OptimizerSettings, rate_share
from llava_mini.training.prefetch import Prefetch
from llava_mini.training.run_log import RunLog
from llava_mini.training.stages import Stage, apply_stage


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a step has to make small."""

    total: Tensor
    """Scalar, with gradients."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named values for the log."""


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


def train_phase(task: Task, settings: PhaseSettings, folder: Path, log: RunLog, *, stop_after: int = -1) -> None:
    """Train from the last checkpoint in ``folder``, or from the start, to the end of the phase.

    Args:
        task: What to learn; its module is updated in place.
        settings: Steps, rules and rates.
        folder: Folder of the phase. Holds ``checkpoint.safetensors``.
        log: Where measurements go.
        stop_after: Leave after this step without a checkpoint, as a kill would; negative: do not.

    Raises:
        ValueError: If the loss is not finite (the message names the step), the checkpoint belongs to
            another phase, or the rules do not fit the parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"
    optimizer = MasterAdamW(apply_stage(task.module.named_parameters(), settings.stage), settings.optimizer)
    if not path.exists():
        _save(path, task.module, optimizer, settings, 0)
    first_step = _resume(path, task.module, optimizer, settings)
    saved_at = started_at = time.monotonic()
    sums: dict[str, float] = {}
    batches = Prefetch(task.make_batch)
    task.module.train()
    for step in range(first_step, settings.num_steps):
        losses = task.losses(batches(step))
        total = float(losses.total.detach())
        if not math.isfinite(total):
            raise ValueError(
                f"The loss of phase {settings.name!r} is {total} at step {step}. The last good state is in {path}. "
                "Lower the learning rates of the stage, or look at the data of this step."
            )
        losses.total.backward()
        share = rate_share(step, settings.num_steps, settings.optimizer)
        norm = optimizer.step(share)
        done = step + 1
        for name, value in {"loss": total, **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + value
        if done % settings.log_every == 0 or done == settings.num_steps:
            seconds = (time.monotonic() - started_at) / (done - first_step)
            since = done % settings.log_every or settings.log_every
            means = {name: value / min(since, done - first_step) for name, value in sums.items()}
            log.write(phase=settings.name, step=done, rate_share=share, gradient_norm=norm, seconds=seconds, **means)
            log.progress(settings.name, done, settings.num_steps, seconds, means)
            sums = {}
        if done == stop_after:
            return
        if done == settings.num_steps or time.monotonic() - saved_at > settings.checkpoint_seconds:
            _save(path, task.module, optimizer, settings, done)
            saved_at = time.monotonic()
    task.module.eval()


def is_finished(settings: PhaseSettings, folder: Path) -> bool:
    """Return whether the checkpoint in ``folder`` stands at the end of the phase."""
    path = folder / "checkpoint.safetensors"
    return path.exists() and read_checkpoint(path)[1].get("step") == settings.num_steps


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load the weights of the checkpoint in ``folder`` into the module that was trained."""
    tensors, _ = read_checkpoint(folder / "checkpoint.safetensors")
    _load_module(module, tensors)


def _save(path: Path, module: nn.Module, optimizer: MasterAdamW, settings: PhaseSettings, done: int) -> None:
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    tensors["random"] = random_state()
    write_checkpoint(path, tensors, {"phase": settings.name, "step": done, "num_steps": settings.num_steps})


def _resume(path: Path, module: nn.Module, optimizer: MasterAdamW, settings: PhaseSettings) -> int:
    tensors, facts = read_checkpoint(path)
    expected = {"phase": settings.name, "num_steps": settings.num_steps}
    found = {name: facts.get(name) for name in expected}
    if found != expected:
        raise ValueError(f"{path} holds {found} but this run has {expected}. Give another folder, or remove the file.")
    _load_module(module, tensors)
    optimizer.restore(
        {name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")}
    )
    torch.set_rng_state(tensors["random"])
    return int(facts["step"])


def _load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict(
        {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
    )
