"""The flags of ``llava-mini train``, whose other commands are in ``llava_mini_cli``. Nothing heavy is imported here."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group, subcommand

_OPTIONAL = arg(help_behavior_hint="")
_DIR = arg(metavar="DIR", help_behavior_hint="")
_NUMBER = arg(metavar="N", help_behavior_hint="")
_RATE = arg(metavar="RATE", help_behavior_hint="")
_NAME = arg(metavar="NAME", help_behavior_hint="")
_FRAMES = create_mutex_group(required=False, title="frames of a video, at most one of")


@dataclass(frozen=True, kw_only=True)
class _Running:
    """Where a training runs, and how long."""

    slice_minutes: Annotated[float | None, arg(metavar="M", help_behavior_hint="")] = None
    """Stop after so long with all that was learned; the same command goes on. Left out: run to the end."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda or cuda:N. Left out: a GPU if there is one."""
    threads: Annotated[int | None, _NUMBER] = None
    """CPU threads of a matrix product. Left out: 1. Two are faster on idle cores, and slower on busy ones."""
    workers: Annotated[int | None, _NUMBER] = None
    """Processes that make batches. Left out: none on a CPU, as many as cores but one beside a GPU."""


@dataclass(frozen=True, kw_only=True)
class Tiny(_Running):
    """Train the embedded model from nothing, on drawn scenes and clips with known answers."""

    output: Annotated[Path | None, _DIR] = None
    """The run's folder: settings, log, curves, checkpoints, scores, and the model. A run that was cut off, killed or
    stopped with Ctrl-C goes on with the same command. Left out: runs/tiny, or runs/tiny-smoke."""
    smoke: Annotated[bool, _OPTIONAL] = False
    """Run all phases in under two minutes, to see that they work."""
    minutes: Annotated[float | None, arg(metavar="M", help_behavior_hint="")] = None
    """Train for about so long. Left out: the recipe's own length."""

    def run(self) -> int:
        """Train."""
        from llava_mini import train_commands

        finished = train_commands.train_tiny(
            self.output,
            smoke=self.smoke,
            minutes=self.minutes,
            slice_minutes=self.slice_minutes,
            device=self.device,
            threads=self.threads,
            workers=self.workers,
        )
        return 0 if finished else 3


@dataclass(frozen=True, kw_only=True)
class Study(_Running):
    """Compare ways to see through few tokens: all rows of the study, on the same data, from the same start."""

    output: Annotated[Path | None, _DIR] = None
    """The study's folder. A study that was cut off goes on with the same command; several processes may do so at once,
    each with rows of its own. Left out: runs/study, or runs/study-smoke."""
    rows: Annotated[tuple[str, ...], arg(metavar="ROW...", help_behavior_hint="")] = ()
    """Train these rows only, and those that they need; a wrong name lists them. Left out: all."""
    seeds: Annotated[int | None, _NUMBER] = None
    """How often each row is trained, each time with other data: all rows with the first seed, then with the next. Left
    out: 3, and 1 with --smoke."""
    steps: Annotated[int | None, _NUMBER] = None
    """Of each row. Left out: 1500."""
    table: Annotated[bool, _OPTIONAL] = False
    """Print the table of what is there, and train nothing."""
    smoke: Annotated[bool, _OPTIONAL] = False
    """The start and two rows in about two minutes, to see that they work."""

    def run(self) -> int:
        """Train."""
        from llava_mini import train_commands

        return train_commands.train_study(self)


@dataclass(frozen=True, kw_only=True)
class _Tuning(_Running):
    """What both stages of the paper need."""

    data: Annotated[Positional[tuple[str, ...]], arg(metavar="DATA...", help_behavior_hint="")] = ()
    """JSON or JSONL files of records in the format of LLaVA. Or what is too large to be kept: shards, .parquet or .tar,
    as files, addresses (hf://, s3://) or quoted patterns, which are read while training goes on and need --steps. None
    are needed with --dry-run."""
    media: Annotated[tuple[Path, ...], arg(metavar="DIR...", help_behavior_hint="")] = ()
    """Where the paths in the records start: one folder for all files, or one for each. Left out: each file's own, and
    none for shards, whose records hold their media."""
    weights: Annotated[tuple[float, ...], arg(metavar="W...", help_behavior_hint="")] = ()
    """How often the records of each file are seen in an epoch: 2 is twice, 0.5 every other one. Left out: once."""
    window: Annotated[int | None, _NUMBER] = None
    """Mix so many records of shards, and group them by kind and length; as many are in memory. Left out: 2048."""
    output: Annotated[Path | None, _DIR] = None
    """The run's folder: settings, log, checkpoints and the model. A run that was cut off goes on with the same command.
    Left out: runs/pretrain or runs/finetune."""
    batch: int = 256
    """Samples of a step, on all devices together."""
    micro_batch: Annotated[int, arg(metavar="N")] = 8
    """Samples that go through a device together."""
    epochs: Annotated[float | None, _NUMBER] = None
    """Left out: 1 for pretrain, 2 for finetune."""
    steps: Annotated[int | None, _NUMBER] = None
    """Instead of epochs."""
    max_length: int = 2048
    """Most tokens of a prompt, those of frames included."""
    frames: Annotated[int | None, _FRAMES, _NUMBER] = None
    """Take this many frames of a video, evenly spread."""
    fps: Annotated[float | None, _FRAMES, arg(metavar="X", help_behavior_hint="")] = None
    """Take this many frames of a video per second. Left out: one."""
    max_frames: int = 32
    """Most frames of a video."""
    features: Annotated[Path | None, _DIR] = None
    """What the vision tower says of all images, from llava-mini data features with this model: it is not run again."""
    template: Annotated[str | None, _NAME] = None
    """Chat template: vicuna_v1, llava_v1, llama_3_1 or chatml. Left out: the model's, or the one of its end token."""
    projector_rate: Annotated[float | None, _RATE] = None
    """Left out: 1e-3 for pretrain, 1e-5 for finetune."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the arithmetic. What trains has float32 copies."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of language model and pre-fusion. flash_attention_2 needs a GPU and the package flash-attn."""
    seed: int = 0
    """Of the order of samples, and of all that is drawn."""
    strategy: Annotated[Literal["ddp", "fsdp"] | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Among the processes that torchrun starts: ddp, each holds the whole model; fsdp, each a part. Left out: fsdp."""
    keep_activations: Annotated[bool, _OPTIONAL] = False
    """Keep the activations of all layers instead of computing them again on the way back: faster, much more memory."""
    compile: Annotated[bool, _OPTIONAL] = False
    """Compile each layer with torch.compile: the first steps take long."""
    max_damaged_share: float = 0.01
    """Stop when more than this share of the samples cannot be read."""
    checkpoint_minutes: float = 20.0
    """Write a checkpoint so often."""
    keep_last: Annotated[int, arg(metavar="N")] = 2
    """How many checkpoints stay. The plan tells how large one is."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where measurements go besides log.jsonl."""
    dry_run: Annotated[bool, _OPTIONAL] = False
    """Print the plan and end. No weights are read."""
    check: Annotated[bool, _OPTIONAL] = False
    """Read all data once as this training would, tell as llava-mini data check does, and end."""
    gpus: Annotated[int | None, _NUMBER] = None
    """With --dry-run: plan for so many devices, without having them."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(_Tuning):
    """Stage 1: the projector alone learns captions; all patches go to the language model."""

    language_model: Annotated[str | None, _NAME] = None
    """vicuna-7b, llama-3.1-8b, or any Llama-like model: a folder, or a repository on the Hugging Face Hub."""
    vision_tower: Annotated[str | None, _NAME] = None
    """A CLIP model: a folder or a repository. Left out: the one of the paper, for its two language models."""
    model: Annotated[str | None, _NAME] = None
    """Instead of both: a model of a stage 1 that goes on."""
    questions: Annotated[bool, _OPTIONAL] = False
    """Keep the questions of the records, in the chat template. By default an image is followed by its caption."""

    def run(self) -> int:
        """Train."""
        from llava_mini import train_commands

        return train_commands.pretrain(self, os.environ)


@dataclass(frozen=True, kw_only=True)
class Finetune(_Tuning):
    """Stage 2: everything but the vision tower learns to follow instructions, through few vision tokens."""

    model: Annotated[str, _NAME]
    """The model of stage 1, a LLaVA-1.5, or any LLaVA-Mini, which goes on and keeps all that it has: a folder, or a
    repository on the Hugging Face Hub. With --dry-run also a preset, or vicuna-7b or llama-3.1-8b for its stage 1."""
    reducer: Annotated[str | None, _NAME] = None
    """Of a model that has none: query (left out), average_pool, identity, or another of docs/methods.md."""
    reducer_grid: Annotated[int | None, arg(metavar="C", help_behavior_hint="")] = None
    """Tokens per side of a frame. Left out: 1, and 8 with --hd."""
    reducer_tokens: Annotated[int | None, arg(metavar="M", help_behavior_hint="")] = None
    """Tokens of a frame, where they form no grid. Left out: 16."""
    prefusion_layers: Annotated[int | None, arg(metavar="K", help_behavior_hint="")] = None
    """Pre-fusion layers of a model that has none. Left out: 4."""
    prefusion_start: Annotated[Literal["language-model", "random"] | None, _NAME] = None
    """What they start from: copies of the language model's first layers (language-model, left out), or random."""
    hd: Annotated[bool, _OPTIONAL] = False
    """Five views of an image, in 64 tokens."""
    language_model_rate: Annotated[float | None, _RATE] = None
    """Learning rate of the language model, its embeddings included. Left out: 1e-4."""
    reducer_rate: Annotated[float | None, _RATE] = None
    """Learning rate of the reducer. Left out: 1e-5."""
    prefusion_rate: Annotated[float | None, _RATE] = None
    """Learning rate of pre-fusion. Left out: 1e-5; from random weights, try 1e-4."""
    lora: Annotated[bool, _OPTIONAL] = False
    """Train low-rank updates of the language model instead of its weights."""
    lora_rank: Annotated[int | None, _NUMBER] = None
    """Rank of the updates. Left out: 128."""
    lora_alpha: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """They are multiplied by this over the rank. Left out: 256."""
    lora_dropout: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Share of what they read that is left out at random. Left out: 0.05."""
    lora_rate: Annotated[float | None, _RATE] = None
    """Learning rate of the updates. Left out: 2e-4."""
    lora_prefusion: Annotated[bool, _OPTIONAL] = False
    """Low-rank updates for pre-fusion too."""
    four_bit: Annotated[bool, _OPTIONAL] = False
    """QLoRA: the language model's frozen weights in 4 bits, by bitsandbytes on a GPU."""

    def run(self) -> int:
        """Train."""
        from llava_mini import train_commands

        return train_commands.finetune(self, os.environ)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from a recipe. The exit code is 0 when the run is finished, 3 when a slice ended before."""

    recipe: (
        Annotated[Tiny, subcommand("tiny")]
        | Annotated[Study, subcommand("study")]
        | Annotated[Pretrain, subcommand("pretrain")]
        | Annotated[Finetune, subcommand("finetune")]
    )

    def run(self) -> int:
        """Train."""
        return self.recipe.run()
