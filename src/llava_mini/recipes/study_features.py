"""What the frozen vision tower says of the frames of a study, made once for all rows."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_mini.data.collate import TrainingBatch
from llava_mini.training.multimodal import InstructionTuning, with_features
from llava_mini.training.trainer import Losses


@dataclass(frozen=True, kw_only=True)
class RowBatch(TrainingBatch):
    """The records of a step, with the place of the features of their frames. There they are read before training."""

    file: Path | None
    """None: features are made and not kept."""


@dataclass(frozen=True, kw_only=True)
class RowBatches:
    """The batch of each step, with features in place of pixels where they are stored."""

    make: Callable[[int], TrainingBatch]
    folder: Path | None

    def __call__(self, step: int) -> RowBatch:
        """Return the batch of a step."""
        batch = self.make(step)
        pixels, file = batch.inputs.pixel_values, None
        if self.folder is not None:
            assert isinstance(pixels, Tensor)
            file = self.folder / f"{step:06d}-{crc32(pixels.numpy().tobytes()):08x}.safetensors"
            if file.exists():
                features = load_file(file)["features"]  # [frames, V, P, E]
                batch = replace(batch, inputs=replace(batch.inputs, pixel_values=None, features=features))
        return RowBatch(**vars(batch), file=file)


class RowTuning(InstructionTuning):
    """Stage 2 of a row. The vision tower is frozen and the same for all rows, so its features are made once."""

    def __init__(self, task: InstructionTuning, features: Path | None) -> None:
        """Take over a task.

        Args:
            task: Whose module, collator and losses these are.
            features: Folder of stored features. None: they are made at every step.
        """
        self.module, self.collator = task.module, task.collator
        self.thing_weight, self.patch_weight, self.teacher = task.thing_weight, task.patch_weight, task.teacher
        self.make_batch = RowBatches(make=task.make_batch, folder=features)

    def losses(self, batch: TrainingBatch) -> Losses:
        """Return the losses on the records of a step, and store the features of its frames."""
        assert isinstance(batch, RowBatch)
        if batch.inputs.features is None:
            batch = replace(batch, inputs=with_features(self.module.model, batch.inputs))
            if batch.file is not None:
                assert batch.inputs.features is not None
                _store(batch.inputs.features, batch.file)
        return super().losses(batch)


def features_folder(output_dir: Path, seed: int) -> Path:
    """Return where the features of the frames of a seed lie while rows need them."""
    return output_dir / "features" / f"seed-{seed}"


def _store(features: Tensor, file: Path) -> None:
    """Write features so that other processes see the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.stem}-{os.getpid()}.draft")
    save_file({"features": features.cpu()}, draft)
    draft.replace(file)
