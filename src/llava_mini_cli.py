"""The console script. One command is one dataclass: its fields are the flags, their docs the help.

Nothing heavy is imported here: torch and transformers come with the command that runs.
"""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg, create_mutex_group, subcommand

from llava_mini_cli_data import Data
from llava_mini_cli_train import Train

if TYPE_CHECKING:
    from llava_mini.commands import Loading
    from llava_mini.inference.settings import AnswerSettings

_FRAMES = create_mutex_group(required=False, title="frames of a video, at most one of")
_OPTIONAL = arg(help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class _Loading:
    """Which model, and where it runs."""

    model: Annotated[str, arg(metavar="MODEL")] = "tiny"
    """The embedded model (tiny), a folder, or a repository on the Hugging Face Hub."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:N or mps. Left out: the fastest there is."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, arg(metavar="FORMAT", help_behavior_hint="")] = (
        None
    )
    """float32, bfloat16 or float16. Left out: what suits the device and the size of the model."""
    quantization: Annotated[Literal["int8"] | None, arg(metavar="int8", help_behavior_hint="")] = None
    """int8 keeps the language model in 8 bits: half the memory, nearly the same answers."""


@dataclass(frozen=True, kw_only=True)
class _Answering(_Loading):
    """How answers are made."""

    max_tokens: int = 512
    """Stop after this many answer tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0, tokens are drawn."""
    frames: Annotated[int | None, _FRAMES, arg(metavar="N", help_behavior_hint="")] = None
    """Take this many frames of a video, evenly spread."""
    fps: Annotated[float | None, _FRAMES, arg(metavar="X", help_behavior_hint="")] = None
    """Take this many frames of a video per second. Left out: one."""
    all_frames: Annotated[bool, _FRAMES, _OPTIONAL] = False
    """Take every frame of a video."""
    cache: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Keep what the model has seen of images and films in this folder, for later commands. It grows without a limit."""
    stats: Annotated[bool, _OPTIONAL] = False
    """Print tokens, frames and seconds by part on stderr."""


@dataclass(frozen=True, kw_only=True)
class Ask(_Answering):
    """Ask one question about images or videos and print the answer as it is made."""

    question: Annotated[Positional[str], arg(metavar="QUESTION", help_behavior_hint="")]
    """What to ask."""
    media: Annotated[Positional[tuple[str, ...]], arg(metavar="MEDIA...", help_behavior_hint="")]
    """Image or video files, in the order in which the question speaks of them."""

    def run(self) -> None:
        """Ask."""
        from llava_mini import commands

        commands.ask(self.question, self.media, _loading(self, self.cache), _settings(self), stats=self.stats)


@dataclass(frozen=True, kw_only=True)
class Chat(_Answering):
    """Talk about images or videos. /help lists what can be typed besides questions."""

    media: Annotated[Positional[tuple[str, ...]], arg(metavar="[MEDIA...]", help_behavior_hint="")] = ()
    """Image or video files to begin with."""

    def run(self) -> None:
        """Talk until the end of the input."""
        from llava_mini import commands

        commands.chat(self.media, _loading(self, self.cache), _settings(self), stats=self.stats)


@dataclass(frozen=True, kw_only=True)
class Watch(_Loading):
    """Watch a camera, a network stream or a film in real time, and answer again and again.

    The question on the command line is answered about all frames so far; with --window or --keep about those that are
    kept, and then lines that are typed are questions too.
    """

    question: Annotated[Positional[str], arg(metavar="QUESTION", help_behavior_hint="")]
    """What to ask."""
    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """rtsp://... or another network stream, camera:0, or a video file, which is played in real time."""
    window: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Keep the last N frames and answer about these."""
    keep: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Keep all frames in this folder and answer about all of them. It grows without a limit."""
    every: float = 10.0
    """Answer every so many seconds of the stream."""
    fps: float = 1.0
    """Look at so many frames per second; those that come while the model is busy are dropped and counted."""
    speed: float = 1.0
    """Play a file so much faster than in reality."""
    max_tokens: int = 512
    """Stop an answer after this many tokens."""

    def run(self) -> None:
        """Watch until the stream ends."""
        from llava_mini import commands

        commands.watch(
            self.question,
            self.source,
            _loading(self, self.keep),
            window=self.window,
            every=self.every,
            fps=self.fps,
            speed=self.speed,
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Rewrite published weights (LLaVA-Mini or LLaVA-1.5, adapters and LoRA included) in this project's layout."""

    source: Annotated[Positional[str], arg(metavar="SRC", help_behavior_hint="")]
    """A folder, or a repository on the Hugging Face Hub."""
    destination: Annotated[Positional[Path], arg(metavar="DST", help_behavior_hint="")]
    """The folder to make. It appears when it is complete; after an interruption, start again."""
    base: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """The model that an adapter belongs to."""
    vision_tower: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """The folder of a CLIP model, where the source holds none."""
    reducer: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Start a new model from LLaVA-1.5 with this reducer: query, average_pool, or another of docs/methods.md; of these
    prumerge, prumerge_plus, visionzip, divprune and fastv need no training."""
    reducer_grid: Annotated[int, arg(metavar="C")] = 1
    """Tokens per side of the new reducer."""
    reducer_tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Tokens of a frame with the new reducer, where they form no grid."""
    prefusion_layers: Annotated[int | None, arg(metavar="K", help_behavior_hint="")] = None
    """Pre-fusion layers of the new model, copied from the language model's first."""

    def run(self) -> None:
        """Convert."""
        from llava_mini import commands

        commands.convert(
            self.source,
            self.destination,
            base=self.base,
            vision_tower=self.vision_tower,
            reducer=self.reducer,
            reducer_grid=self.reducer_grid,
            reducer_tokens=self.reducer_tokens,
            prefusion_num_layers=self.prefusion_layers,
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Split a model into a plain language model folder and a front-end folder, for other programs."""

    destination: Annotated[Positional[Path], arg(metavar="DST", help_behavior_hint="")]
    """The folder to make."""
    model: Annotated[str, arg(metavar="MODEL")] = "tiny"
    """The embedded model (tiny), a folder, or a repository on the Hugging Face Hub."""

    def run(self) -> None:
        """Export."""
        from llava_mini import commands

        commands.export(self.model, self.destination)


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Loading):
    """Score a model on questions with known answers: by kind, with 95 % intervals, beside a blind guess."""

    bench: Positional[Literal["tiny"]]
    """tiny: pictures and clips of the drawn world, so many questions of each kind; under two minutes on a CPU."""
    split: Literal["test", "validation"] = "test"
    """Which questions: those to choose settings on, or those to report."""
    questions: int = 100
    """How many of each kind about images; half as many of each kind about clips."""
    forms: Annotated[bool, _OPTIONAL] = False
    """Print the scores of each form of question too."""
    json: Annotated[bool, _OPTIONAL] = False
    """Print a last line of JSON: scores, seconds, device, versions, commit."""
    answers: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write each question with its answer into this file, one JSON object a line."""
    write_card: Annotated[bool, _OPTIONAL] = False
    """Write the scores into the model's folder: scores.json, and the table of its README.md. Needs the test split and
    no fewer questions than by default."""

    def run(self) -> None:
        """Ask and count."""
        from llava_mini import commands

        commands.evaluate_tiny(
            _loading(self),
            split=self.split,
            questions=self.questions,
            forms=self.forms,
            as_json=self.json,
            answers=self.answers,
            write_card=self.write_card,
        )


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Show what a model looks at: one HTML page, with its pictures and tables beside it.

    Attention by layer and type of token, over the image, in pre-fusion and in compression; and answers with vision
    tokens dropped in ranges of layers.
    """

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "tiny"
    """The embedded model (tiny), a folder, or a repository on the Hugging Face Hub: a LLaVA-Mini, or a LLaVA-1.5 or
    LLaVA-NeXT of transformers."""
    data: Annotated[tuple[str, ...], arg(metavar="FILE...|world")] = ("world",)
    """JSON or JSONL files of records in the format of LLaVA, or world: drawn scenes with known answers."""
    output: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]
    """The folder of the page. That of an earlier analysis is replaced when this one is complete."""
    media: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Where the paths in the records start. Left out: the folder of each file."""
    samples: int = 100
    """Most questions; the first one of each record."""
    examples: int = 4
    """Questions that get pictures of their own."""
    dropped: int = 100
    """Most questions that are also answered with vision tokens dropped in ranges of layers: most of the time."""
    answers: Literal["model", "data"] = "model"
    """Whose answers the response tokens are: the model's own, or the right ones."""
    max_tokens: int = 64
    """Stop an answer after this many tokens."""
    frames: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Take this many frames of a video, evenly spread. Left out: one per second."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:N or mps. Left out: the fastest there is."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, arg(metavar="FORMAT", help_behavior_hint="")] = (
        None
    )
    """float32, bfloat16 or float16. Left out: what suits the device and the size of the model."""

    def run(self) -> None:
        """Look."""
        from llava_mini import commands
        from llava_mini.analysis.findings import AnalysisSettings
        from llava_mini.analysis.run import Loading

        loading = Loading(model=self.model, device=self.device, dtype=self.dtype, num_frames=self.frames)
        settings = AnalysisSettings(
            answers=self.answers, examples=self.examples, dropped=self.dropped, max_tokens=self.max_tokens
        )
        commands.analyze(loading, self.data, self.output, settings, media=self.media, samples=self.samples)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print a model's parts, parameters, tokens per frame, and what a prompt costs, without loading its weights."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "tiny"
    """The embedded model (tiny), a preset, a folder, or a repository on the Hugging Face Hub."""
    frames: int = 1
    """Frames in the prompt."""
    text_tokens: int = 43
    """Text tokens in the prompt, the system prompt included."""

    def run(self) -> None:
        """Print."""
        from llava_mini import commands

        commands.info(self.model, num_frames=self.frames, num_text_tokens=self.text_tokens)


_OPEN = arg(help_behavior_hint="")
_NUMBER = arg(metavar="N", help_behavior_hint="")
_NUMBERS = arg(metavar="N...", help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what questions cost, beside other ways and other models: tables, then one line of JSON.

    Each benchmark has settings of its own and names them when it is given another. What is left out has the
    benchmark's default.
    """

    name: Positional[Literal["flops", "latency", "video", "memory", "train", "decode", "load"]]
    """flops: operations from the configuration alone, beside the paper's. latency: time of a first and a later
    question, by part, beside other models. video: the same of many frames, and peaks. memory: bytes that a frame
    keeps, and peaks. train: a step of both stages, in time and memory. decode: frames per second of a film. load: from
    nothing to an answer of the embedded model."""
    size: Annotated[Literal["tiny", "middle", "7b", "8b"] | None, _OPEN] = None
    """Size of the random weights. middle: the real vision tower before a small language model."""
    tokens: Annotated[tuple[int, ...] | None, _NUMBERS] = None
    """Tokens of an image in the language model: square numbers, each compared with the others."""
    hd: Annotated[bool, _OPTIONAL] = False
    """Five views of the image, with twice as many pixels a side."""
    frames: Annotated[tuple[int, ...] | None, _NUMBERS] = None
    """video, memory: how many frames, each measured."""
    text_tokens: Annotated[int | None, _NUMBER] = None
    """Words of the prompt, the system prompt included; train: before the answer, in stage 2."""
    kept_tokens: Annotated[int | None, _NUMBER] = None
    """latency, video: how many of them stand before the image and are the same for all questions."""
    answer_tokens: Annotated[int | None, _NUMBER] = None
    """latency, video: tokens of the answer that are timed. train: words of the answer, in stage 2."""
    stages: Annotated[tuple[int, ...] | None, _NUMBERS] = None
    """train: 1, 2 or both."""
    samples: Annotated[int | None, _NUMBER] = None
    """train: images of a step, each with its text."""
    recompute: Annotated[tuple[Literal["no", "yes"], ...] | None, arg(metavar="no yes", help_behavior_hint="")] = None
    """train: whether layers are computed again on the way back, to keep less; no, yes or both."""
    low_rank: Annotated[int | None, _NUMBER] = None
    """train: rank of low-rank updates of the language model in stage 2, instead of training it in full."""
    update: Annotated[bool, _OPTIONAL] = False
    """train: update the weights too, which is the same work in all orders and takes 16 bytes for each that trains."""
    repeats: Annotated[int | None, _NUMBER] = None
    """How often each thing is measured."""
    warmup: Annotated[int | None, _NUMBER] = None
    """How often each thing is run before that."""
    device: Annotated[str | None, arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:N or mps. Left out: the fastest there is."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, arg(metavar="FORMAT", help_behavior_hint="")] = (
        None
    )
    """float32, bfloat16 or float16. Left out: what suits the device and the size."""
    dtypes: Annotated[tuple[str, ...] | None, arg(metavar="FORMATS...", help_behavior_hint="")] = None
    """video: number formats, each compared with the others."""
    released_frames: Annotated[int | None, _NUMBER] = None
    """video: most frames for the released order of work, which is slow."""
    most_tokens: Annotated[int | None, _NUMBER] = None
    """video: LLaVA-v1.5 and Video-LLaVA are measured as long as their frames make no more tokens than this."""
    kept_on_host: Annotated[bool, _OPTIONAL] = False
    """video: on a GPU, what a later question needs of the frames waits in the host's memory."""
    compiled: Annotated[bool, _OPTIONAL] = False
    """latency: one more contestant, ours with torch.compile. Compiling takes minutes of the warm-up."""
    memory_limit: Annotated[float | None, arg(metavar="GIB", help_behavior_hint="")] = None
    """latency, video, memory, train: how much of the GPU's memory may be used, as if the card had no more."""
    width: Annotated[int | None, _NUMBER] = None
    """decode: pixels of the film."""
    height: Annotated[int | None, _NUMBER] = None
    """decode: pixels of the film."""
    rate: Annotated[int | None, _NUMBER] = None
    """decode: frames of the film per second."""
    seconds: Annotated[int | None, _NUMBER] = None
    """decode: length of the film."""
    codec: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """decode: video encoder of the film."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the line of JSON into this file too."""

    def run(self) -> None:
        """Measure."""
        from llava_mini import commands

        own = {name: value for name, value in vars(self).items() if name not in ("name", "output")}
        given = {name: value for name, value in own.items() if value is not None and value is not False}
        commands.bench(self.name, given, output=self.output)


Command = (
    Annotated[Ask, subcommand("ask")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Analyze, subcommand("analyze")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Bench, subcommand("bench")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is 0, 2 for input that cannot be used, 130 after Ctrl-C.

    ``train`` has two more: 3 when there is more to do, and 143 after SIGTERM.

    Args:
        arguments: what was typed after ``llava-mini``. None: what the process was started with.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _quiet_libraries()
    if arguments == ["--version"]:
        print("llava-mini", _version())
        return 0
    command = tyro.cli(Command, prog="llava-mini", description=_DESCRIPTION, args=arguments, config=_STYLE)
    try:
        from llava_mini import commands

        commands.prepare_terminal()
        code = command.run()
        if sys.stdout is not None:  # the shell can close it
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; what Python flushes at its end must have somewhere to go.
        assert sys.stdout is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"llava-mini: {error}", file=sys.stderr)
        return 2
    return 0


_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
_DESCRIPTION = "See an image, or each frame of a video, through one vision token. --version prints the version."


def _loading(flags: _Loading, cache: Path | None = None) -> "Loading":
    from llava_mini.commands import Loading

    return Loading(
        model=flags.model, device=flags.device, dtype=flags.dtype, quantization=flags.quantization, cache=cache
    )


def _settings(flags: _Answering) -> "AnswerSettings":
    from llava_mini.inference.settings import AnswerSettings

    return AnswerSettings(
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        num_frames=flags.frames,
        fps=flags.fps,
        all_frames=flags.all_frames,
    )


def _version() -> str:
    try:
        return importlib.metadata.version("llava-mini")
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        from llava_mini import __version__

        return __version__


def _quiet_libraries() -> None:
    """Keep what the libraries tell their developers on import off the terminal; errors still come through."""
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
