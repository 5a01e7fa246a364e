"""The flags of ``llava-mini data``. As in the console script itself, nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group, subcommand

_FRAMES = create_mutex_group(required=False, title="frames of a video, at most one of")
_OPTIONAL = arg(help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class Synth:
    """Draw scenes and clips, and questions with known answers, as PNG, MP4 and JSON in the format of LLaVA."""

    folder: Annotated[Positional[Path], arg(metavar="DIR", help_behavior_hint="")]
    """The folder to make. A command that was cut off goes on when it is started again."""
    split: Literal["train", "validation", "test"] = "train"
    """No record of one split is in another; some phrasings are in the test split only."""
    images: int = 1000
    """How many images."""
    clips: int = 100
    """How many clips."""
    first: int = 0
    """Index of the first of each, as a seed: the same indices give the same files, others give other records."""
    questions: int = 3
    """Most questions about each; those that a picture does not allow are left out."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """How many draw at a time. Left out: one per core if that saves time. The files do not depend on it."""

    def run(self) -> None:
        """Write."""
        from llava_mini import data_commands

        data_commands.synth(
            self.folder,
            split=self.split,
            images=self.images,
            clips=self.clips,
            first=self.first,
            questions=self.questions,
            processes=self.processes,
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read all records and their media once, as training would: what there is, what is damaged, what would be learned.

    The exit code is 0 when nothing is damaged, 1 when something is.
    """

    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE...", help_behavior_hint="")]
    """JSON or JSONL files of records in the format of LLaVA; or Parquet files and tars that can be streamed, also at
    addresses (hf://, s3://) and as patterns in quotes."""
    media: Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")] = ()
    """Where the paths in the records start: one folder for all files, or one for each. Left out: each file's own;
    shards hold their media."""
    model: Annotated[str, arg(metavar="MODEL")] = "tiny"
    """Whose tokens and pictures: the embedded model (tiny), a folder, or a repository on the Hugging Face Hub. Its
    weights are not read."""
    frames: Annotated[int | None, _FRAMES, arg(metavar="N", help_behavior_hint="")] = None
    """Take this many frames of a video, evenly spread."""
    fps: Annotated[float | None, _FRAMES, arg(metavar="X", help_behavior_hint="")] = None
    """Take this many frames of a video per second. Left out: one."""
    max_frames: int = 32
    """Most frames of a video."""
    max_length: int = 2048
    """Most tokens of a prompt, those of frames included, and never more than the model's context."""
    captions: Annotated[bool, _OPTIONAL] = False
    """Leave the questions out, and with them the chat template, as the first stage of training does."""
    published: Annotated[
        Literal["llava-pretrain", "llava-v1.5-mix665k", "video-chatgpt-100k", "llava-onevision-single-image"] | None,
        arg(metavar="NAME", help_behavior_hint=""),
    ] = None
    """Compare the numbers with those of a published set: llava-pretrain, llava-v1.5-mix665k, video-chatgpt-100k or
    llava-onevision-single-image."""
    quarantine: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write what is damaged into this file, one JSON object a line."""
    samples: int = 3
    """Print so many samples, with what is fused and what is learned marked."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """How many read at a time. Left out: one per core if that saves time. With more than one, a file that crashes its
    reader is only damaged."""

    def run(self) -> int:
        """Read."""
        from llava_mini import data_commands
        from llava_mini.data.check import CheckSettings

        settings = CheckSettings(
            num_frames=self.frames,
            fps=self.fps,
            max_frames=self.max_frames,
            max_length=self.max_length,
            captions=self.captions,
            published=self.published,
            examples=self.samples,
            processes=self.processes,
        )
        clean = data_commands.check(self.files, self.media, self.model, settings, quarantine=self.quarantine)
        return 0 if clean else 1


@dataclass(frozen=True, kw_only=True)
class Features:
    """Compute what the vision tower says of all images, once, for trainings in which it is frozen.

    What it costs on disk is told first, and refused if it does not fit; the same command goes on where it was cut off.
    The exit code is 0 when all images could be read, 1 when some could not.
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...", help_behavior_hint="")]
    """JSON or JSONL files of records in the format of LLaVA."""
    output: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]
    """The folder of the features. Those of several models can be in one."""
    media: Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")] = ()
    """Where the paths in the records start: one folder for all files, or one for each. Left out: each file's own."""
    model: Annotated[str, arg(metavar="MODEL")] = "tiny"
    """Whose vision tower: the embedded model (tiny), a folder, or a repository on the Hugging Face Hub."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:N or mps. Left out: the fastest there is."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, arg(metavar="FORMAT", help_behavior_hint="")] = (
        None
    )
    """float32, bfloat16 or float16: the one of the training. Left out: what suits the device and the model's size."""

    def run(self) -> int:
        """Compute."""
        from llava_mini import data_commands

        complete = data_commands.features(
            self.files, self.media, self.output, self.model, device=self.device, dtype=self.dtype
        )
        return 0 if complete else 1


@dataclass(frozen=True, kw_only=True)
class Data:
    """Make data to train on, and see what training will find in it."""

    command: (
        Annotated[Synth, subcommand("synth")]
        | Annotated[Check, subcommand("check")]
        | Annotated[Features, subcommand("features")]
    )

    def run(self) -> int | None:
        """Do it."""
        return self.command.run()
