"""What each command of ``llava-mini`` runs: the parts of this package, put together and printed.

Answers and tables go to stdout; progress, statistics, warnings and errors to stderr.
"""

import contextlib
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

import transformers
from tqdm import tqdm

from llava_mini.checkpoint.locate import EMBEDDED, locate
from llava_mini.config import PRESETS, LlavaMiniConfig
from llava_mini.data.check import CheckReport, CheckSettings, DataCheck, Records, Shards
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.streaming import StreamSettings
from llava_mini.data.synthetic.splits import Split
from llava_mini.inference.answer import AnswerStream
from llava_mini.inference.conversation import Conversation
from llava_mini.inference.devices import keep_freed_memory
from llava_mini.inference.engine import Engine
from llava_mini.inference.loading import read_config
from llava_mini.inference.media import media_parts
from llava_mini.inference.settings import AnswerSettings, Caching
from llava_mini.inference.watch import Watch
from llava_mini.model import cost
from llava_mini.processor.processor import LlavaMiniProcessor

if TYPE_CHECKING:
    from llava_mini.analysis import run as analysis
    from llava_mini.analysis.findings import AnalysisSettings

CHAT_HELP = """\
/add FILE   show one more image or video with the next question
/reset      forget what was said and begin again with the first files
/help       this list
/quit       end (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, and where it runs; as in ``Engine.load``."""

    model: str
    device: str | None
    dtype: str | None
    quantization: str | None
    cache: Path | None = None
    """Where frames are kept on disk. None: nowhere."""

    def engine(self) -> Engine:
        """Load it."""
        keep_freed_memory()
        caching = Caching(folder=self.cache and self.cache.expanduser())
        return Engine.load(self.model, self.device, self.dtype, self.quantization, caching)


def prepare_terminal() -> None:
    """Keep the libraries' notices, meant for their developers, off the terminal, and tell our warnings in one line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module="llava_mini")
    warnings.showwarning = lambda message, *_, **__: print(f"llava-mini: warning: {message}", file=sys.stderr)


def ask(question: str, media: Sequence[str], loading: Loading, settings: AnswerSettings, *, stats: bool) -> None:
    """Print the answer to one question while it is made.

    Raises:
        ValueError: there is nothing to ask about, or nothing is asked.
    """
    if not media:
        raise ValueError("There is no image or video to ask about. Give one or more files after the question.")
    if not question.strip():
        raise ValueError("The question is empty. Ask something about the image or video.")
    parts = media_parts(media)  # files that are missing are told before a large model is loaded
    counter = _FrameCounter()
    stream = loading.engine().stream(
        question,
        parts,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        num_frames=settings.num_frames,
        fps=settings.fps,
        all_frames=settings.all_frames,
        progress=counter,
    )
    _print_answer(stream, counter)
    if stats:
        print(stream.stats, file=sys.stderr)


def chat(media: Sequence[str], loading: Loading, settings: AnswerSettings, *, stats: bool) -> None:
    """Talk until the input ends: lines from a terminal or a pipe, answers as they are made.

    An error ends the turn and not the conversation; so does Ctrl-C on a terminal.
    """
    parts, counter = media_parts(media), _FrameCounter()
    conversation = loading.engine().chat(parts, settings, counter)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print("Ask something; /help lists what else can be typed.")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                _obey(conversation, line)
            elif line:
                _print_answer(conversation.say(line), counter)
                if stats:
                    print(conversation.stats, file=sys.stderr)
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(stopped; Ctrl-D or /quit ends)")
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"llava-mini: {error}", file=sys.stderr)


def convert(
    source: str,
    destination: Path,
    *,
    base: str | None,
    vision_tower: str | None,
    reducer: str | None,
    reducer_grid: int,
    reducer_tokens: int | None,
    prefusion_num_layers: int | None,
) -> None:
    """Rewrite a model in our layout; as in ``checkpoint.convert``."""
    from llava_mini.checkpoint.convert import convert

    made = convert(
        source,
        destination,
        base=base,
        vision_tower=vision_tower,
        reducer=reducer,
        reducer_grid=reducer_grid,
        reducer_tokens=reducer_tokens,
        prefusion_num_layers=prefusion_num_layers,
    )
    print(made)


def export(model: str, destination: Path) -> None:
    """Write a plain language model and a front end; as in ``checkpoint.export``."""
    from llava_mini.checkpoint.export import export

    print(export(model, destination))


def evaluate_tiny(
    loading: Loading,
    *,
    split: Split,
    questions: int,
    forms: bool,
    as_json: bool,
    answers: Path | None,
    write_card: bool,
) -> None:
    """Score a model on the bench of the drawn world; as in ``evaluation.bench``.

    Raises:
        ValueError: what is to be written cannot be, or a card is asked for with too few questions.
    """
    from llava_mini.evaluation import card
    from llava_mini.evaluation.bench import Bench, run_bench
    from llava_mini.evaluation.environment import environment
    from llava_mini.evaluation.exact_match import form_scores, score_table, scores
    from llava_mini.recipes.tiny import tiny_settings

    bench = Bench(world=tiny_settings().world, split=split, questions=questions)
    if write_card and (split != Bench.split or questions < Bench.questions):
        raise ValueError(
            f"A card needs the {Bench.split} split with at least {Bench.questions} questions of each kind, but "
            f"{questions} of the {split} split were asked for. Leave out --write-card, or --split and --questions."
        )
    folder = locate(loading.model)
    if answers is not None:
        check_writable(answers)
    for path in card.card_files(folder) if write_card else ():
        check_writable(path)
    engine = loading.engine()
    start, start_work = time.perf_counter(), time.process_time()
    with tqdm(total=bench.total, desc="asking", unit=" questions", leave=False, disable=None, file=sys.stderr) as bar:
        marks = run_bench(engine.model, engine.processor, bench, progress=bar.update)
    seconds, work = time.perf_counter() - start, time.process_time() - start_work
    print(score_table(scores(marks, bench.weights)))
    if forms:
        print(f"\n{score_table(form_scores(marks))}")
    took = f"{seconds:.0f} seconds ({work:.0f} of processor time)"
    print(f"\n{loading.model}, {split} split: {len(marks)} questions in {took}")
    if answers is not None:
        answers.write_text("".join(json.dumps(one.facts()) + "\n" for one in marks), encoding="utf-8")
    if not (as_json or write_card):
        return
    facts = card.card_facts(
        bench,
        marks,
        folder=folder,
        seconds=seconds,
        processor_seconds=work,
        environment=environment(engine.model.device, engine.model.dtype),
    )
    if as_json:
        print(json.dumps({"model": loading.model, **{name: fact for name, fact in facts.items() if name != "marks"}}))
    if write_card:
        card.write_card(folder, facts)


def analyze(
    loading: "analysis.Loading",
    data: Sequence[str],
    output: Path,
    settings: "AnalysisSettings",
    *,
    media: Path | None,
    samples: int,
) -> None:
    """Write the page of what a model looks at; as in ``analysis.run``."""
    from llava_mini.analysis.run import analyse_model
    from llava_mini.evaluation.bench import Bench
    from llava_mini.recipes.tiny import tiny_settings

    bench = Bench(world=tiny_settings().world)
    with tqdm(total=samples, desc="looking", unit=" questions", leave=False, disable=None, file=sys.stderr) as bar:
        page = analyse_model(
            loading, data, output, settings, bench=bench, media=media, samples=samples, progress=bar.update
        )
    print(page)


def watch(
    question: str,
    source: str,
    loading: Loading,
    *,
    window: int | None,
    every: float,
    fps: float,
    speed: float,
    max_tokens: int,
) -> None:
    """Answer a question about a live stream again and again until it ends, and those that are typed.

    Raises:
        ValueError: a number is out of range, a window together with a folder that keeps everything, or a stream that
            cannot be read or is lost.
    """
    if not every > 0:
        raise ValueError(f"--every takes a number of seconds above 0, got {every}.")
    if window is not None and loading.cache is not None:
        raise ValueError("--window keeps the last frames and --keep all of them. Give one of the two.")
    standing = question if window is None and loading.cache is None else None
    live = loading.engine().watch(source, question=standing, window=window, fps=fps, max_tokens=max_tokens, speed=speed)
    typed: SimpleQueue[str] = SimpleQueue()
    if standing is None:
        Thread(target=_pass_on_lines, args=(typed,), daemon=True).start()
    answered = -math.inf
    with live:
        for moment in live:
            _answer_typed(live, typed)
            if moment.time - answered >= every:
                _print_moment(live, None if standing else question)
                answered = moment.time
    if live.moment.time > answered:
        _print_moment(live, None if standing else question)
    _answer_typed(live, typed)


def _pass_on_lines(lines: "SimpleQueue[str]") -> None:
    for line in sys.stdin:
        if line.strip():
            lines.put(line.strip())


def _answer_typed(live: Watch, typed: "SimpleQueue[str]") -> None:
    while not typed.empty():
        try:
            _print_moment(live, typed.get())
        except ValueError as error:  # of one question; the watch goes on
            print(f"llava-mini: {error}", file=sys.stderr)


def _print_moment(live: Watch, question: str | None) -> None:
    """Print an answer with the stream's time, and on stderr what was not seen."""
    moment = live.moment
    minutes, seconds = divmod(round(moment.time), 60)
    answer = live.ask(question)  # a question that cannot be answered is told without a time before it
    print(f"[{minutes // 60:02}:{minutes % 60:02}:{seconds:02}] ", end="")
    _print_answer(answer, _FrameCounter())
    told = [f"{moment.frames} frames seen"]
    told += [f"{moment.dropped} dropped"] if moment.dropped else []
    told += [f"the context was full {live.began_anew} times, and the answer begun anew"] if live.began_anew else []
    print(f"({', '.join(told)})", file=sys.stderr)


def info(model: str, *, num_frames: int, num_text_tokens: int) -> None:
    """Print a model's parts and what a prompt costs, from its configuration.

    Raises:
        ValueError: there is no such model or preset; the message lists the known ones.
    """
    config = _config_of(model)
    prompt = {"num_frames": num_frames, "num_text_tokens": num_text_tokens}
    counts, operations = cost.parameters(config), cost.flops(config, **prompt)
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    print(
        f"{model}: {config.tokens_per_frame} of {config.patches_per_frame} vision tokens per frame "
        f"({config.reducer}), {config.prefusion_num_layers} pre-fusion layers, {config.views_per_frame} x "
        f"{config.vision.image_size} px, {config.text.model_type} with {config.text.max_position_embeddings} "
        "positions\n"
    )
    weights = cost.weight_bytes(config, dtype)
    print(f"{'part':<16}{'parameters':>18}{dtype + ' weights':>20}{'operations':>14}")
    for part, count in {**counts.as_dict(), "total": counts.total}.items():
        size, work = getattr(weights, part), getattr(operations, part)
        print(f"{part:<16}{count:>18,}{_scaled(size, 'B'):>20}{_scaled(work, 'FLOP'):>14}")
    print(
        f"\nOperations: {num_frames} frame(s) and {num_text_tokens} text tokens, up to the first token of the answer.\n"
        f"Paper's counting: {_scaled(cost.paper_flops(config, **prompt).total, 'FLOP')}.\n"
        f"Keys and values: {_scaled(cost.keys_values_bytes_per_token(config, dtype), 'B')} for each token; "
        f"{_scaled(cost.prefusion_bytes_per_frame(config, dtype), 'B')} in pre-fusion for each frame."
    )


def bench(name: str, given: Mapping[str, object], *, output: Path | None) -> None:
    """Run a benchmark: its tables, then a line of JSON, which also goes into ``output``; as in ``benchmarks.run``.

    Raises:
        ValueError: there is no such benchmark or setting, or the file cannot be written.
    """
    from llava_mini.benchmarks.run import run_benchmark

    if output is not None:
        check_writable(output)
    report = run_benchmark(name, given)
    print(f"{report}\n\n{report.line()}", flush=True)
    if output is not None:
        report.write(output)


def _config_of(model: str) -> LlavaMiniConfig:
    if model in PRESETS and model not in EMBEDDED:
        return PRESETS[model]()
    try:
        return read_config(model)
    except ValueError as error:
        raise ValueError(f"{error} The presets are: {', '.join(PRESETS)}.") from error


def checked(
    files: Sequence[DataFile],
    stream: StreamSettings | None,
    processor: LlavaMiniProcessor,
    config: LlavaMiniConfig,
    settings: CheckSettings,
) -> CheckReport:
    """Read records and their media once, print what they are, and return it.

    Args:
        files: Lists of records.
        stream: Shards instead of them.
        processor: What training would use.
        config: Of the model that would train.
        settings: What is asked for.
    """
    source = Records(mixture=Mixture(files)) if stream is None else Shards(stream=stream)
    start, work = time.perf_counter(), DataCheck(source, processor, config, settings)
    total = len(source) if isinstance(source, Records) else None  # nobody knows how many are in shards
    with tqdm(total=total, desc="reading", unit=" records", leave=False, disable=None, file=sys.stderr) as bar:
        report = work.run(bar.update)
    print(report.text(), *work.examples(report), sep="\n\n")
    print(f"\n{len(report.records)} records read in {time.perf_counter() - start:.1f} s")
    return report


def check_writable(path: Path) -> None:
    """Make the folder of a file, and see that the file can be written, before the work for it is done.

    Raises:
        ValueError: it cannot.
    """
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder. Give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{str(path)!r} lies in a file, not in a folder. Give a file in a folder.") from error
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be written ({error.strerror}). Give a file in a folder that can be written to."
        ) from error


def _scaled(number: int, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number} {unit}"


class _FrameCounter:
    """Shows frames read so far, their speed and the time left, on stderr if it is a terminal and it takes a while."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, num_frames: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = tqdm(desc="reading", unit=" frames", delay=1, leave=False, disable=None, file=sys.stderr)
        self._bar.total = total
        self._bar.update(num_frames - self._bar.n)

    def clear(self) -> None:
        """Take it away; the next answer begins a new one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _print_answer(stream: AnswerStream, counter: _FrameCounter) -> None:
    try:
        with stream:
            for piece in stream:
                counter.clear()
                print(piece, end="", flush=True)
        print(flush=True)
    finally:
        counter.clear()


def _obey(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/help":
        print(CHAT_HELP)
    elif command == "/reset":
        conversation.reset()
    elif command == "/add" and argument:
        path = argument.strip()
        conversation.add(Path(path).expanduser() if path.startswith("~") else path)
    else:
        raise ValueError(f"{line!r} is not something that can be typed here.\n{CHAT_HELP}")
