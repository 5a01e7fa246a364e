"""Time to the first token of an answer about one image, for a first and for a later question, and its parts.

Question: how long does an answer take, in the order of work of the released code, in the order here, and by
          other models before the same language model?
Expected: the order here is faster for a first question, because it computes no row that nobody reads, and many
          times faster for a later one, whose vision is kept; vision, and not the language model, is what is left
          of a first question.
Run:      llava-mini bench latency --size middle --tokens 1 4

A later question keeps all that does not depend on it, for every model: see ``contestants``. All times are of the
device's work, from pixels and ids on it to the id of the answer's first token.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_mini.benchmarks.compiled import ANSWER_TOKENS, OursCompiled
from llava_mini.benchmarks.contestants import Contestant, LanguageModel, Ours, OursAsReleased, Words
from llava_mini.benchmarks.floors import Floors, Rates, floors, measure_rates
from llava_mini.benchmarks.peers import build_peers
from llava_mini.benchmarks.report import Report, Table, told
from llava_mini.benchmarks.sizes import changed, limit_memory, made_on, random_model, settled, size_config, with_parts
from llava_mini.benchmarks.timing import PARTS, Laps, seconds_of, take_turns
from llava_mini.evaluation.environment import environment
from llava_mini.inference.devices import choose_device, choose_dtype
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import build_reducer

FIRST_WORD = 3
"""The least id that a prompt of random words holds: those before it have meanings of their own."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is timed."""

    size: str = "middle"
    """tiny, middle, 7b or 8b."""
    tokens: tuple[int, ...] = (1,)
    """Tokens of an image: each number is a contestant."""
    hd: bool = False
    """Five views of the image in our models."""
    text_tokens: int = cost.PAPER_TEXT_TOKENS
    """Words of the prompt."""
    kept_tokens: int = 23
    """How many of them stand before the image and are the same for all questions."""
    answer_tokens: int = 8
    """Tokens of the answer after the second one, for the time of each."""
    repeats: int = 10
    """Rounds that are counted."""
    warmup: int = 3
    """Rounds before them that are not."""
    device: str | None = None
    """None: the fastest there is."""
    dtype: str | None = None
    """None: what suits device and size."""
    compiled: bool = False
    """Let one more contestant be ours with torch.compile, which falls into the warm-up and takes minutes of it."""
    memory_limit: float | None = None
    """GiB of the GPU's memory that may be used. None: all."""

    def __post_init__(self) -> None:
        if not self.tokens or len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"tokens are numbers from 1 on, each of them once; got {list(self.tokens)}.")
        for tokens in self.tokens:
            size_config(self.size, tokens=tokens, hd=self.hd)
        if not 0 <= self.kept_tokens < self.text_tokens:
            raise ValueError(
                f"The kept words are some of the {self.text_tokens} words of the prompt, and a question needs one "
                f"more; got {self.kept_tokens}."
            )
        if self.compiled and (self.answer_tokens >= ANSWER_TOKENS or self.warmup < 1):
            raise ValueError(
                f"With compiled, answer_tokens is at most {ANSWER_TOKENS - 1} and the warm-up at least a round; got "
                f"answer_tokens={self.answer_tokens}, warmup={self.warmup}."
            )
        for name, least in (("answer_tokens", 1), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


def run(settings: Settings) -> Report:
    """Build all contestants and let them take turns.

    Raises:
        ValueError: there is no such device or number format, or a memory limit without a GPU.
    """
    device = choose_device(settings.device)
    limit_memory(settings.memory_limit, device)
    config = size_config(settings.size, tokens=settings.tokens[0], hd=settings.hd)
    dtype = choose_dtype(settings.dtype, device, cost.parameters(config).total)
    rates = measure_rates(device, dtype)  # first: under a memory limit the models leave no room for it
    with torch.inference_mode():
        contestants, missing = _contestants(settings, device, dtype)
        kept = {}
        for one in contestants:
            try:
                kept[one.name] = one.keep()
            except torch.OutOfMemoryError:
                missing[one.name] = "out of memory"
        found = take_turns(
            {
                one.name: lambda one=one: _round(one, kept[one.name], settings, device)
                for one in contestants
                if one.name in kept
            },
            warmup=settings.warmup,
            repeats=settings.repeats,
        )
    missing |= {name: "out of memory" for name, rounds in found.items() if not rounds}
    tokens = {one.name: one.tokens for one in contestants}
    times = {name: {"tokens": tokens[name], **_times(rounds)} for name, rounds in found.items() if rounds}
    settings = replace(settings, device=str(device), dtype=str(dtype).removeprefix("torch."))
    least = {one.name: vars(_floors(one, settings, rates)) for one in contestants if isinstance(one, Ours)}
    results = {"contestants": times, "missing": missing, "rates": vars(rates), "floors_s": least}
    return Report(
        bench="latency",
        environment=environment(device, dtype),
        settings=vars(settings),
        results=results,
        tables=tables(results, settings),
    )


def with_tokens(model: LlavaMiniForConditionalGeneration, tokens: int) -> LlavaMiniForConditionalGeneration:
    """A model that makes so many tokens of an image, and shares all its weights but the reducer's with ``model``."""
    config = changed(model.config, reducer_grid=math.isqrt(tokens))
    reducer = build_reducer(config)
    for parameter in reducer.parameters():
        parameter.data.normal_(0, 0.02)
    made = with_parts(model, reducer=settled(reducer, model.dtype))
    made.config = config
    return made


def _contestants(
    settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[list[Contestant], dict[str, str]]:
    """Ours in both orders and with all numbers of tokens, and the peers."""
    config = size_config(settings.size, tokens=settings.tokens[0], hd=settings.hd)
    model = random_model(config, device, dtype)
    with made_on(device, dtype):
        ids = torch.randint(FIRST_WORD, config.text.vocab_size, (1, settings.text_tokens))
        words = Words(kept=ids[:, : settings.kept_tokens], question=ids[:, settings.kept_tokens :])
        pixels = torch.randn(1, config.views_per_frame, 3, config.image_size, config.image_size)
        models = [model, *(with_tokens(model, tokens) for tokens in settings.tokens[1:])]
    label = "LLaVA-Mini, HD" if settings.hd else "LLaVA-Mini"
    contestants: list[Contestant] = [OursAsReleased(f"{label}, released order", model, pixels, words)]
    contestants += [Ours(f"{label}, {_tokens(one.config.tokens_per_frame)}", one, pixels, words) for one in models]
    if settings.compiled:
        name = f"{label}, {_tokens(model.config.tokens_per_frame)}, compiled"
        contestants.append(OursCompiled(name, model, pixels, words))
    peers, missing = build_peers(
        config, LanguageModel(model.language_model), words, is_tiny=settings.size == "tiny", dtype=dtype
    )
    return [*contestants, *peers], missing


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _floors(one: Ours, settings: Settings, rates: Rates) -> Floors:
    assert settings.dtype is not None
    return floors(one.model.config, settings.dtype, settings.text_tokens, rates)


def _round(one: Contestant, kept: Any, settings: Settings, device: torch.device) -> dict[str, Any]:
    """One of all times of a contestant, in seconds; the parts come from runs of their own."""
    silent = Laps(device=device, by_part=False)
    first = seconds_of(lambda: one.first(silent), device)
    later = seconds_of(lambda: one.later(kept, silent), device)
    answering = one.step(one.first(silent))  # not counted: a fixed cache is filled with it

    def answer() -> None:
        state = answering
        for _ in range(settings.answer_tokens):
            state = one.step(state)

    token = seconds_of(answer, device) / settings.answer_tokens
    parts = {}
    for question, ask in (("first", one.first), ("later", lambda laps: one.later(kept, laps))):
        laps = Laps(device=device, by_part=True)
        laps.start()
        ask(laps)
        parts[question] = laps.seconds
    return {"first": first, "later": later, "token": token, "parts": parts}


def _times(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All times of a contestant in milliseconds: whole, and by part."""
    whole = {f"{name}_ms": [1e3 * one[name] for one in rounds] for name in ("first", "later", "token")}
    parts = {
        f"{question}_parts_ms": {
            part: [1e3 * one["parts"][question][part] for one in rounds]
            for part in PARTS
            if part in rounds[0]["parts"][question]
        }
        for question in ("first", "later")
    }
    return {**whole, **parts}


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    times, missing = results["contestants"], results["missing"]
    what = f"one image, {settings.text_tokens} text tokens ({settings.kept_tokens} kept), {settings.size}"
    whole = Table(
        title=f"Milliseconds, median (quartiles) of {settings.repeats}: {what}",
        columns=("model", "tokens", "first question", "later question", "each token"),
        rows=[
            *(
                (name, str(one["tokens"]), *(told(one[f"{of}_ms"]) for of in ("first", "later", "token")))
                for name, one in times.items()
            ),
            *((name, "-", "not run", "", reason) for name, reason in missing.items()),
        ],
    )
    parts = Table(
        title="Milliseconds by part, median (quartiles)",
        columns=("model", "question", *PARTS),
        rows=[
            (name, question, *(told(one[f"{question}_parts_ms"].get(part, [])) for part in PARTS))
            for name, one in times.items()
            for question in ("first", "later")
        ],
    )
    return [whole, parts, _floor_table(results)]


def _floor_table(results: Mapping[str, Any]) -> Table:
    """Ours against the least time, in medians."""
    rows = []
    for name, least in results["floors_s"].items():
        if name not in results["contestants"]:
            continue
        row = [name]
        for part in ("first", "token"):
            median = statistics.median(results["contestants"][name][f"{part}_ms"])
            row += [f"{1e3 * least[part]:.2f}", f"{median / (1e3 * least[part]):.2f}"]
        rows.append(tuple(row))
    rates = results["rates"]
    return Table(
        title=f"The least milliseconds at the {rates['operations'] / 1e12:.3g} T operations and "
        f"{rates['bandwidth'] / 1e9:.4g} GB a second that were measured, and how many times as long it took",
        columns=("model", "least, first question", "times as long", "least, each token", "times as long"),
        rows=rows,
    )
