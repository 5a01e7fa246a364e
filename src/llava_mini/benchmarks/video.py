"""Time and memory from the pixels of a film to the first token of an answer, and to that of a later question.

Question: what do many frames cost, in the order of work of the released code (frame by frame, everything held,
          everything again for every question), in the order here, and with all tokens of every frame?
Expected: the order here is faster by what it does not compute and by its batches, and its peak does not grow with
          the film but for the tokens kept; a later question skips the vision tower and what follows it but the text.
Run:      llava-mini bench video --size middle --frames 8 32 --dtypes float32 bfloat16

Decoding is left out: ``bench decode`` measures it. What is compared is in ``film_ways``; LLaVA-v1.5 and Video-LLaVA
read every token of every frame, as far as ``most_tokens`` allows. Device and host are drained after each part of each
chunk, so that the parts come from the same runs as the whole.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llava_mini.benchmarks.film_ways import WAYS, Film, Way, WayName, film_model, make_way, tokens_of
from llava_mini.benchmarks.peaks import peak_in_process, peak_of
from llava_mini.benchmarks.report import Report, Table, scaled, told, tupled
from llava_mini.benchmarks.sizes import limit_memory, size_config
from llava_mini.benchmarks.timing import PARTS, Laps, drained, take_turns
from llava_mini.evaluation.environment import environment
from llava_mini.inference.devices import DTYPES, choose_device, choose_dtype, keep_freed_memory
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

_TIMES = ("first", "later", "token")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    size: str = "middle"
    """tiny, middle, 7b or 8b."""
    frames: tuple[int, ...] = (8, 32)
    """How many frames, each number measured."""
    text_tokens: int = cost.PAPER_TEXT_TOKENS
    """Words of the prompt."""
    kept_tokens: int = 23
    """How many of them stand before the frames."""
    released_frames: int = 32
    """Most frames for the released order, which is slow."""
    most_tokens: int = 8192
    """LLaVA-v1.5 and Video-LLaVA are measured as long as their frames make no more tokens than this."""
    answer_tokens: int = 8
    """Tokens of the answer after the first one, for the time of each."""
    repeats: int = 3
    """Rounds that are counted."""
    warmup: int = 1
    """Rounds before them that are not."""
    device: str | None = None
    """None: the fastest there is."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Number formats, each compared with the others."""
    kept_on_host: bool = False
    """On a GPU: what pre-fusion left of the frames waits in the host's memory for a later question."""
    memory_limit: float | None = None
    """GiB of the GPU's memory that may be used. None: all."""

    def __post_init__(self) -> None:
        size_config(self.size)
        if not self.frames or len(set(self.frames)) != len(self.frames) or min(self.frames) < 1:
            raise ValueError(f"frames are numbers from 1 on, each of them once; got {list(self.frames)}.")
        if not self.dtypes or len(set(self.dtypes)) != len(self.dtypes) or not {*self.dtypes} <= {*DTYPES}:
            raise ValueError(f"dtypes are some of {', '.join(DTYPES)}, each of them once; got {list(self.dtypes)}.")
        if not 0 <= self.kept_tokens < self.text_tokens:
            raise ValueError(
                f"The kept words are some of the {self.text_tokens} words of the prompt, and a question needs one "
                f"more; got {self.kept_tokens}."
            )
        least = {"repeats": 1, "warmup": 0, "released_frames": 0, "most_tokens": 0, "answer_tokens": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}.")

    def film(self, frames: int) -> Film:
        """The film with so many frames, and its prompt."""
        return Film(frames=frames, kept=self.kept_tokens, question=self.text_tokens - self.kept_tokens)


def run(settings: Settings) -> Report:
    """Measure the memory of all ways one by one, then their times in turns.

    Raises:
        ValueError: there is no such device, a number format that does not suit it, or a memory limit without a GPU.
    """
    device = choose_device(settings.device)
    for dtype in settings.dtypes:
        choose_dtype(dtype, device, 0)
    limit_memory(settings.memory_limit, device)
    settings = replace(settings, device=str(device))
    # Peaks first: their processes need the room that this one takes for the times.
    peaks = {
        (way, dtype, frames): _peak(settings, way, dtype, frames, device)
        for frames in settings.frames
        for way, dtype in _asked(settings, frames)
    }
    films = [settings.film(frames) for frames in settings.frames]
    most = max(tokens_of(way, film, settings.size) for film in films for way, _ in _asked(settings, film.frames))
    models = {
        dtype: film_model(films[0], settings.size, device, DTYPES[dtype], most_tokens=most) for dtype in settings.dtypes
    }
    results: list[dict[str, Any]] = []
    for frames in settings.frames:
        for one in _times(settings, frames, models, device):
            results.append({**one, "peak": peaks[one["way"], one["dtype"], frames]})
    return Report(
        bench="video",
        environment=environment(device, DTYPES[settings.dtypes[0]]),
        settings=vars(settings),
        results={"ways": results},
        tables=tables({"ways": results}, settings),
    )


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    return [_table(results["ways"], settings), _parts_table(results["ways"])]


def _asked(settings: Settings, frames: int) -> list[tuple[WayName, str]]:
    """Ways with their number formats, as far as they are measured at this number of frames."""

    def fits(way: WayName) -> bool:
        if way == "released":
            return frames <= settings.released_frames
        return way == "here" or tokens_of(way, settings.film(frames), settings.size) <= settings.most_tokens

    return [(way, dtype) for way in WAYS if fits(way) for dtype in settings.dtypes]


def _times(
    settings: Settings,
    frames: int,
    models: Mapping[str, LlavaMiniForConditionalGeneration],
    device: torch.device,
) -> list[dict[str, Any]]:
    """All times of each way, in seconds."""
    asked, film = _asked(settings, frames), settings.film(frames)
    rounds: dict[tuple[WayName, str], Callable[[], dict[str, Any]]] = {}
    with torch.inference_mode():
        for way, dtype in asked:
            made = make_way(way, film, models[dtype], kept_on_host=settings.kept_on_host)
            with suppress(torch.OutOfMemoryError):  # it then has no times
                rounds[way, dtype] = partial(_round, made, made.keep(), settings, device)
        found = take_turns(rounds, warmup=settings.warmup, repeats=settings.repeats)
    return [
        {
            "way": way,
            "dtype": dtype,
            "frames": frames,
            "tokens": tokens_of(way, film, settings.size),
            **_times_of(found.get((way, dtype), [])),
        }
        for way, dtype in asked
    ]


def _times_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All times of a way by name: whole, and by part."""
    whole = {f"{name}_s": [one[name] for one in rounds] for name in _TIMES}
    measured = [part for part in PARTS if rounds and part in rounds[0]["parts"]]
    return {**whole, "parts_s": {part: [one["parts"][part] for one in rounds] for part in measured}}


def _round(way: Way, kept: Any, settings: Settings, device: torch.device) -> dict[str, Any]:
    """One of all times of a way. Where nothing is kept, a later question is the first one again."""
    laps, since = Laps(device=device, by_part=True), drained(device)
    laps.start()
    answering = way.first(laps)
    first = drained(device) - since
    since = drained(device)
    for _ in range(settings.answer_tokens):
        answering = way.step(answering)
    token = (drained(device) - since) / settings.answer_tokens
    later = first
    if kept is not None:
        since = drained(device)
        way.later(kept, Laps(device=device, by_part=False))
        later = drained(device) - since
    return {"first": first, "later": later, "token": token, "parts": laps.seconds}


def _peak(settings: Settings, way: WayName, dtype: str, frames: int, device: torch.device) -> dict[str, int] | None:
    """Bytes above the weights while the first question is answered; None where they cannot be measured."""
    if device.type not in ("cpu", "cuda"):
        return None
    fields = {**vars(settings), "dtypes": [dtype]}
    return peak_in_process("video", {"way": way, "dtype": dtype, "frames": frames, "settings": fields})


def peak_here(wanted: Mapping[str, Any]) -> dict[str, int] | None:
    """What the first question adds at most to this process's memory, and to the GPU's. For a process of its own.

    Returns:
        Bytes by place: ``host``, and ``device`` for a GPU. None: out of memory.
    """
    keep_freed_memory()
    settings = Settings(**tupled(wanted["settings"]))
    assert settings.device is not None
    device, film = torch.device(settings.device), settings.film(wanted["frames"])
    limit_memory(settings.memory_limit, device)
    most = tokens_of(wanted["way"], film, settings.size)
    model = film_model(film, settings.size, device, DTYPES[wanted["dtype"]], most_tokens=most)
    with torch.inference_mode():
        way = make_way(wanted["way"], film, model)
        return peak_of(lambda: way.first(Laps(device=device, by_part=False)), device)


def _table(results: list[dict[str, Any]], settings: Settings) -> Table:
    rows = []
    for one in results:
        first = sorted(one["first_s"])
        speed = f"{one['frames'] / first[len(first) // 2]:.2f}" if first else "-"
        peak = one["peak"] or {}
        rows.append(
            (
                *_named(one),
                str(one["tokens"]),
                told(first),
                speed,
                told(one["later_s"], 3),
                told([1e3 * seconds for seconds in one["token_s"]], 1),
                scaled(peak["host"], "B") if "host" in peak else "-",
                scaled(peak["device"], "B") if "device" in peak else "-",
            )
        )
    return Table(
        title=f"Seconds to the first token, median (quartiles) of {settings.repeats}; {settings.text_tokens} text "
        f"tokens, {settings.size}; peak of a first question above the weights",
        columns=(
            *("way", "format", "frames", "tokens", "first question", "frames/s", "later question", "ms a token"),
            *("peak, host", "peak, GPU"),
        ),
        rows=rows,
        left=("format",),
    )


def _parts_table(results: list[dict[str, Any]]) -> Table:
    return Table(
        title="Seconds of the first question by part, median (quartiles)",
        columns=("way", "format", "frames", *PARTS),
        rows=[(*_named(one), *(told(one["parts_s"].get(part, [])) for part in PARTS)) for one in results],
        left=("format",),
    )


def _named(one: Mapping[str, Any]) -> tuple[str, str, str]:
    way: WayName = one["way"]
    return WAYS[way], one["dtype"], str(one["frames"])
