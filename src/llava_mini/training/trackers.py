"""Where measurements go besides ``log.jsonl``: TensorBoard or Weights & Biases, which are guests."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from llava_mini.training.checkpoints import write_text

TrackerName = Literal["none", "tensorboard", "wandb"]


class Tracker(Protocol):
    """Is told every line of the log."""

    def write(self, facts: Mapping[str, Any]) -> None:
        """Take one line: ``phase``, ``step``, numbers, and mappings from names to numbers."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def open_tracker(name: str, folder: Path) -> Tracker | None:
    """Return the tracker of a run, None for ``none``.

    Args:
        name: One of ``TrackerName``.
        folder: Of the run; its name is the name of the run, and what a tracker writes lies in it.

    Raises:
        ValueError: There is no such tracker, or it is not installed.
    """
    if name == "none":
        return None
    if name == "tensorboard":
        return _TensorBoard(folder)
    if name == "wandb":
        return _WeightsAndBiases(folder)
    raise ValueError(f"There is no tracker {name!r}; choose one of {', '.join(get_args(TrackerName))}.")


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ValueError("TensorBoard is not installed: pip install 'llava-mini[tensorboard]'.") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, facts: Mapping[str, Any]) -> None:
        for name, value in numbers_of(facts).items():
            self._writer.add_scalar(name, value, int(facts["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("Weights & Biases is not installed: pip install 'llava-mini[wandb]'.") from error
        identity = folder / "wandb.id"  # a run that goes on after a kill is one run there, too
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex)
        self._run = wandb.init(
            project="llava-mini", name=folder.name, id=identity.read_text(), resume="allow", dir=str(folder)
        )

    def write(self, facts: Mapping[str, Any]) -> None:
        self._run.log({**numbers_of(facts), f"{facts['phase']}/step": facts["step"]})

    def close(self) -> None:
        self._run.finish()


def numbers_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line as ``phase/name`` or ``phase/group/name``."""
    phase, numbers = facts["phase"], {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            numbers |= {f"{phase}/{name}/{part}": float(number) for part, number in value.items()}
        elif name not in ("phase", "step", "time"):
            numbers[f"{phase}/{name}"] = float(value)
    return numbers
