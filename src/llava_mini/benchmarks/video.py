"""Time and memory from the pixels of a film to the first token of an answer, and to that of a later question.

Question: what do many frames cost, in the order of work of the released code (frame by frame, everything held,
          everything again for every question), in the order here, and with all tokens of every frame?
Expected: the order here is faster by what it does not compute and by its batches, and its peak does not grow with
          the film but for the tokens kept; a later question skips the vision tower and what follows it but the text.
Run:      llava-mini bench video --size middle --frames 8 32 --dtypes float32 bfloat16

Decoding is left out: ``bench decode`` measures it. Frames of the order here come chunk by chunk from a small pool of
random pixels, as from a decoder; the released order gets all of them at once, as the released code does. LLaVA-v1.5
reads every token of every frame, as far as ``most_tokens`` allows.
"""

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from llava_mini.benchmarks.memory import largest_resident
from llava_mini.benchmarks.processes import fresh_result
from llava_mini.benchmarks.released import fuse_as_released
from llava_mini.benchmarks.report import Report, Table, scaled, told
from llava_mini.benchmarks.sizes import changed, limit_memory, random_model, size_config
from llava_mini.benchmarks.timing import seconds_of, take_turns
from llava_mini.config import LlavaMiniConfig
from llava_mini.evaluation.environment import environment
from llava_mini.flow import FrameChunk, FusedPrompt, ModelInputs, SeenChunk, SeenFrames
from llava_mini.inference.devices import DTYPES, choose_device
from llava_mini.inference.torch_backend import PREFILL_TOKENS
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

Way = Literal["here", "released", "all tokens"]
WAYS: dict[Way, str] = {
    "here": "LLaVA-Mini, here",
    "released": "LLaVA-Mini, released order",
    "all tokens": "LLaVA-v1.5",
}
"""What is compared, with the names that people read."""

POOL = 8
"""Different frames that are shown again and again."""
WORD = 5
"""The id of every word of the prompts."""
_CHILD = "from llava_mini.benchmarks.video import peak_here; import json; print(json.dumps(peak_here(*sys.argv[1:])))"


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
    """LLaVA-v1.5 is measured as long as its frames make no more tokens than this."""
    repeats: int = 3
    """Rounds that are counted."""
    warmup: int = 1
    """Rounds before them that are not."""
    device: str | None = None
    """None: the fastest there is."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Number formats, each compared with the others."""
    memory_limit: float | None = None
    """GiB of the GPU's memory that may be used. None: all."""

    def __post_init__(self) -> None:
        size_config(self.size)
        if not self.frames or len(set(self.frames)) != len(self.frames) or min(self.frames) < 1:
            raise ValueError(f"frames are numbers from 1 on, each of them once; got {list(self.frames)}.")
        if not self.dtypes or not {*self.dtypes} <= {*DTYPES}:
            raise ValueError(f"dtypes are some of {', '.join(DTYPES)}; got {list(self.dtypes)}.")
        if not 0 <= self.kept_tokens < self.text_tokens:
            raise ValueError(
                f"The kept words are some of the {self.text_tokens} words of the prompt, and a question needs one "
                f"more; got {self.kept_tokens}."
            )
        for name, least in (("repeats", 1), ("warmup", 0), ("released_frames", 0), ("most_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


def run(settings: Settings) -> Report:
    """Measure times of all ways in turns, then their memory one by one.

    Raises:
        ValueError: there is no such device, or a memory limit without a GPU.
    """
    device = choose_device(settings.device)
    limit_memory(settings.memory_limit, device)
    settings = replace(settings, device=str(device))
    results: dict[str, Any] = {}
    for frames in settings.frames:
        found = _times(settings, frames, device)
        gc.collect()
        for label, one in found.items():
            results[f"{label}, {frames} frames"] = {**one, "peak": _peak(settings, label, frames, device)}
    return Report(
        bench="video",
        environment=environment(device, DTYPES[settings.dtypes[0]]),
        settings=vars(settings),
        results={"ways": results},
        tables=[_table(results, settings)],
    )


def way_config(size: str, way: Way, most_positions: int) -> LlavaMiniConfig:
    """The model behind a way, whose language model takes so many positions."""
    config = size_config(size)
    text = {**config.text.to_dict(), "max_position_embeddings": max(most_positions, 4096)}
    plain = {"reducer": "identity", "prefusion_num_layers": 0} if way == "all tokens" else {}
    return changed(config, text_config=text, **plain)


def _asked(settings: Settings, frames: int) -> list[tuple[Way, str]]:
    """Ways with their number formats, as far as they are measured at this number of frames."""
    ways: list[Way] = ["here"]
    if frames <= settings.released_frames:
        ways.append("released")
    if frames * size_config(settings.size).patches_per_frame <= settings.most_tokens:
        ways.append("all tokens")
    return [(way, dtype) for way in ways for dtype in settings.dtypes]


def _label(way: Way, dtype: str) -> str:
    return f"{WAYS[way]}, {dtype}"


def _times(settings: Settings, frames: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of first and later questions by label; the ways share weights where they can."""
    models: dict[tuple[bool, str], LlavaMiniForConditionalGeneration] = {}
    calls: dict[str, Callable[[], dict[str, float]]] = {}
    for way, dtype in _asked(settings, frames):
        key = (way == "all tokens", dtype)
        if key not in models:
            positions = frames * size_config(settings.size).patches_per_frame if key[0] else frames
            config = way_config(settings.size, way, positions + settings.text_tokens + 1)
            models[key] = random_model(config, device, DTYPES[dtype])
        calls[_label(way, dtype)] = partial(_round, models[key], way, settings, frames, device)
    with torch.inference_mode():
        found = take_turns(calls, warmup=settings.warmup, repeats=settings.repeats)
    return {
        label: {f"{name}_s": [one[name] for one in rounds] for name in ("first", "later")}
        for label, rounds in found.items()
    }


def _round(
    model: LlavaMiniForConditionalGeneration, way: Way, settings: Settings, frames: int, device: torch.device
) -> dict[str, float]:
    pool = _pool(model)
    first = seconds_of(lambda: first_question(model, way, settings, frames, pool), device)
    if way == "released":  # which keeps nothing
        return {"first": first, "later": seconds_of(lambda: first_question(model, way, settings, frames, pool), device)}
    before = model.text_before_frames(_prompt(model, settings))
    seen = model.see(pool, before)
    prefix = _prefix(model, settings, frames, seen)
    later = seconds_of(lambda: later_question(model, settings, frames, seen, prefix), device)
    return {"first": first, "later": later}


def first_question(
    model: LlavaMiniForConditionalGeneration, way: Way, settings: Settings, frames: int, pool: Tensor
) -> Tensor:
    """From pixels to the logits of the answer's first token: [1, vocabulary].

    Args:
        model: any.
        way: released, or not.
        settings: the prompt.
        frames: how many.
        pool: [POOL, V, 3, H, W], shown again and again.
    """
    if way == "released":
        pixels = pool[torch.arange(frames) % POOL]  # all of them at once
        inputs = _prompt(model, settings, places=frames * model.config.tokens_per_frame)
        fused = fuse_as_released(model, ModelInputs(input_ids=inputs.input_ids, pixel_values=pixels))
    else:
        inputs = _prompt(model, settings)
        fused = model.fuse(ModelInputs(input_ids=inputs.input_ids, pixel_values=_streamed(pool, frames)))
    return _read(model, fused.inputs_embeds, None)


def later_question(
    model: LlavaMiniForConditionalGeneration, settings: Settings, frames: int, seen: SeenFrames, prefix: Any
) -> Tensor:
    """From the ids of another question to the logits of its first token: vision and prefix are at hand."""
    fused = _fused_again(model, settings, frames, seen)
    length = prefix.get_seq_length()
    logits = _read(model, fused.inputs_embeds[:, length:], prefix)
    prefix.crop(length - prefix.get_seq_length())
    return logits


def _fused_again(
    model: LlavaMiniForConditionalGeneration, settings: Settings, frames: int, seen: SeenFrames
) -> FusedPrompt:
    chunks = (SeenChunk(seen=seen.take([*rows]), slot=0) for rows in _rows(frames))
    return model.fuse(ModelInputs(input_ids=_prompt(model, settings).input_ids, pixel_values=chunks))


def _prefix(model: LlavaMiniForConditionalGeneration, settings: Settings, frames: int, seen: SeenFrames) -> Any:
    """The language model's keys and values of kept words and frames."""
    cache = DynamicCache()
    length = settings.kept_tokens + frames * model.config.tokens_per_frame
    _read(model, _fused_again(model, settings, frames, seen).inputs_embeds[:, :length], cache)
    return cache


def _read(model: LlavaMiniForConditionalGeneration, embeds: Tensor, cache: Any) -> Tensor:
    """Let the language model read a prompt in pieces; logits of the last position."""
    cache = DynamicCache() if cache is None else cache
    *pieces, last = embeds.to(model.dtype).split(PREFILL_TOKENS, dim=1)
    for piece in pieces:
        model.language_model.get_decoder()(inputs_embeds=piece, past_key_values=cache, use_cache=True)
    out = model.language_model(inputs_embeds=last, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]


def _prompt(model: LlavaMiniForConditionalGeneration, settings: Settings, places: int = 1) -> ModelInputs:
    """Kept words, places of frames, and a question."""
    image = model.config.image_token_id or 0
    words = [WORD] * settings.kept_tokens, [WORD] * (settings.text_tokens - settings.kept_tokens)
    ids = torch.tensor([[*words[0], *[image] * places, *words[1]]], device=model.device)
    return ModelInputs(input_ids=ids)


def _rows(frames: int) -> Iterator[range]:
    for start in range(0, frames, POOL):
        yield range(min(POOL, frames - start))


def _streamed(pool: Tensor, frames: int) -> Iterator[FrameChunk]:
    for rows in _rows(frames):
        yield FrameChunk(pixel_values=pool[: len(rows)], slot=0)


def _pool(model: LlavaMiniForConditionalGeneration) -> Tensor:
    config = model.config
    shape = (POOL, config.views_per_frame, 3, config.image_size, config.image_size)
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def _peak(settings: Settings, label: str, frames: int, device: torch.device) -> int | None:
    """Bytes above the weights while the first question is answered; None where they cannot be measured."""
    way, dtype = next((way, dtype) for way, dtype in _asked(settings, frames) if _label(way, dtype) == label)
    request = {"way": way, "dtype": dtype, "frames": frames, "settings": {**vars(settings), "dtypes": [dtype]}}
    if device.type not in ("cpu", "cuda"):
        return None
    found, _ = fresh_result(_CHILD, json.dumps(request))
    return found


def peak_here(request: str) -> int | None:
    """What the first question adds to this process's memory at most. For a process of its own. None: out of memory."""
    wanted = json.loads(request)
    fields = wanted["settings"]
    settings = Settings(**{**fields, "frames": tuple(fields["frames"]), "dtypes": tuple(fields["dtypes"])})
    assert settings.device is not None
    device, frames, way = torch.device(settings.device), wanted["frames"], wanted["way"]
    limit_memory(settings.memory_limit, device)
    config = way_config(settings.size, way, frames * size_config(settings.size).patches_per_frame + 100)
    model = random_model(config, device, DTYPES[wanted["dtype"]])
    before = _held(device)
    try:
        with torch.inference_mode():
            first_question(model, way, settings, frames, _pool(model))
    except torch.OutOfMemoryError:
        return None
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else largest_resident()
    return most - before


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return largest_resident()


def _table(results: Mapping[str, Any], settings: Settings) -> Table:
    rows = []
    for label, one in results.items():
        frames = int(label.rsplit(", ", 1)[1].split()[0])
        first = one["first_s"]
        speed = f"{frames / sorted(first)[len(first) // 2]:.1f}" if first else "-"
        peak = "-" if one["peak"] is None else scaled(one["peak"], "B")
        rows.append((label, told(first), speed, told(one["later_s"], 3), peak))
    return Table(
        title=f"Seconds to the first token, median (quartiles) of {settings.repeats}; {settings.text_tokens} text "
        f"tokens, {settings.size}; memory above the weights",
        columns=("way", "first question", "frames/s", "later question", "peak"),
        rows=rows,
    )
