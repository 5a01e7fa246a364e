"""Bytes that an image or a frame keeps, and the most that answering needs at a time, beside the cost model's.

Question: what does a frame keep for the language model, and for a later question? How does the peak grow with
          the number of frames?
Expected: one token keeps a thousandth of what all patches keep in the language model; a later question keeps much
          more, in pre-fusion. The peak of a long video grows by the language model's share alone, because
          frames pass through in chunks.
Run:      llava-mini bench memory --size middle --frames 1 4

The peak is what the first token of an answer needs above the weights. On CUDA it is what torch allocated; on a CPU
it is how much a new process's largest resident size grew, so it also holds what libraries keep for themselves.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_mini.benchmarks.peaks import peak_in_process, peak_of
from llava_mini.benchmarks.report import Report, Table, scaled, tupled
from llava_mini.benchmarks.sizes import changed, limit_memory, random_model, size_config
from llava_mini.config import LlavaMiniConfig
from llava_mini.evaluation.environment import environment
from llava_mini.flow import FrameChunk, ModelInputs
from llava_mini.inference.devices import DTYPES, choose_device, choose_dtype, keep_freed_memory
from llava_mini.inference.memory import memory_need
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import FRAMES_PER_CHUNK

WORD = 5
"""The id of every word of the prompts."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    size: str = "middle"
    """tiny, middle, 7b or 8b."""
    tokens: tuple[int, ...] = (1,)
    """Tokens of a frame: each number is a way, beside all patches without pre-fusion (LLaVA-v1.5)."""
    hd: bool = False
    """Five views of each frame."""
    frames: tuple[int, ...] = (1, 4)
    """How many frames, for the peak."""
    text_tokens: int = cost.PAPER_TEXT_TOKENS
    """Words of the prompt."""
    device: str | None = None
    """None: the fastest there is. On MPS no peak is measured."""
    dtype: str | None = None
    """None: what suits device and size."""
    memory_limit: float | None = None
    """GiB of the GPU's memory that may be used. None: all."""

    def __post_init__(self) -> None:
        for name in ("tokens", "frames"):
            numbers = getattr(self, name)
            if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 1:
                raise ValueError(f"{name} are numbers from 1 on, each of them once; got {list(numbers)}.")
        for tokens in self.tokens:
            size_config(self.size, tokens=tokens, hd=self.hd)
        if self.text_tokens < 1:
            raise ValueError(f"A prompt has at least one text token to ask with, got {self.text_tokens}.")


def run(settings: Settings) -> Report:
    """Measure all ways, one after the other: memory, unlike time, does not depend on the others.

    Raises:
        ValueError: there is no such device or number format, or a memory limit without a GPU.
    """
    device = choose_device(settings.device)
    limit_memory(settings.memory_limit, device)
    plain = size_config(settings.size, hd=settings.hd)
    dtype = choose_dtype(settings.dtype, device, cost.parameters(plain).total)
    settings = replace(settings, device=str(device), dtype=str(dtype).removeprefix("torch."))
    ways = {}
    for name in way_names(settings):
        ways[name] = measure(name, settings)
        gc.collect()
        torch.cuda.empty_cache()
    return Report(
        bench="memory",
        environment=environment(device, dtype),
        settings=vars(settings),
        results={"ways": ways},
        tables=tables({"ways": ways}, settings),
    )


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    return [_kept_table(results["ways"], settings), _peak_table(results["ways"], settings)]


def way_names(settings: Settings) -> list[str]:
    """What is compared."""
    return [*(_label(tokens) for tokens in settings.tokens), "LLaVA-v1.5"]


def way_config(name: str, settings: Settings) -> LlavaMiniConfig:
    """The model behind a name."""
    for tokens in settings.tokens:
        if name == _label(tokens):
            return size_config(settings.size, tokens=tokens, hd=settings.hd)
    return changed(size_config(settings.size, hd=settings.hd), reducer="identity", prefusion_num_layers=0)


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Bytes that a frame keeps, measured and counted, and peaks by number of frames; None: out of memory."""
    assert settings.device is not None
    assert settings.dtype is not None
    config, device = way_config(name, settings), torch.device(settings.device)
    model = random_model(config, device, DTYPES[settings.dtype])
    peaks: dict[str, int | None] = {}
    for frames in settings.frames if device.type == "cuda" else ():
        peaks[str(frames)] = _gpu_peak(model, frames, settings.text_tokens)
    estimates = {
        str(frames): memory_need(model, DTYPES[settings.dtype], frames=min(frames, model.frames_per_pass)).working
        for frames in settings.frames
    }
    found = {"kept": kept_bytes(model, settings.text_tokens), "counted": _counted(config, settings.dtype)}
    del model
    for frames in settings.frames if device.type == "cpu" else ():
        request = {"name": name, "frames": frames, "settings": vars(settings)}
        peaks[str(frames)] = peak_in_process("memory", request)
    return {**found, "peak": peaks, "estimated": estimates}


@torch.inference_mode()
def kept_bytes(model: LlavaMiniForConditionalGeneration, text_tokens: int) -> dict[str, int]:
    """Bytes of the tensors that stay of one frame: measured on one frame, and on the difference to two."""
    features = model.encode_frames(_frames(model, 1))
    patches, reduced = model.reduce_frames(features)
    read = model.read(patches, reduced, None)
    assert read.vision is not None
    one, two = (_stored(_prefill(model, frames, text_tokens)) for frames in (1, 2))
    return {
        "vision_tokens": _stored([read.vision]),
        "language_model": two - one,
        "prefusion": _stored(tensor for pair in read.keys_values for tensor in pair),
        "features": _stored([features]),
    }


def peak_here(wanted: Mapping[str, Any]) -> int:
    """Bytes by which answering makes this process's largest resident size grow. For a process of its own."""
    keep_freed_memory()
    settings = Settings(**tupled(wanted["settings"]))
    assert settings.dtype is not None
    config, cpu = way_config(wanted["name"], settings), torch.device("cpu")
    model = random_model(config, cpu, DTYPES[settings.dtype])
    peak = peak_of(lambda: _prefill(model, wanted["frames"], settings.text_tokens), cpu)
    assert peak is not None
    return peak["host"]


def _gpu_peak(model: LlavaMiniForConditionalGeneration, frames: int, text_tokens: int) -> int | None:
    peak = peak_of(lambda: _prefill(model, frames, text_tokens), model.device)
    return None if peak is None else peak["device"]


@torch.inference_mode()
def _prefill(model: LlavaMiniForConditionalGeneration, frames: int, text_tokens: int) -> list[Tensor]:
    """Answer's first token for a prompt with one video; the keys and values that the language model then holds."""
    words = torch.full((1, text_tokens), WORD, device=model.device)
    place = torch.full((1, 1), model.config.image_token_id or 0, device=model.device)
    inputs = ModelInputs(input_ids=torch.cat([place, words], dim=1), pixel_values=_streamed(model, frames))
    fused = model.fuse(inputs)
    out = model.language_model(inputs_embeds=fused.inputs_embeds, use_cache=True, logits_to_keep=1)
    return [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]


def _streamed(model: LlavaMiniForConditionalGeneration, frames: int) -> Iterator[FrameChunk]:
    for start in range(0, frames, FRAMES_PER_CHUNK):
        yield FrameChunk(pixel_values=_frames(model, min(FRAMES_PER_CHUNK, frames - start)), slot=0)


def _frames(model: LlavaMiniForConditionalGeneration, frames: int) -> Tensor:
    config = model.config
    shape = (frames, config.views_per_frame, 3, config.image_size, config.image_size)
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def _stored(tensors: Iterable[Tensor]) -> int:
    """Bytes behind some tensors: a view keeps all that it is a view of."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _counted(config: LlavaMiniConfig, dtype: str) -> dict[str, int]:
    """What the cost model says of one frame."""
    size = DTYPES[dtype].itemsize
    return {
        "vision_tokens": config.tokens_per_frame * config.text.hidden_size * size,
        "language_model": config.tokens_per_frame * cost.keys_values_bytes_per_token(config, dtype),
        "prefusion": cost.prefusion_bytes_per_frame(config, dtype),
        "features": config.patches_per_frame * config.vision.hidden_size * size,
    }


def _label(tokens: int) -> str:
    return f"LLaVA-Mini, {tokens} token{'' if tokens == 1 else 's'}"


def _kept_table(ways: Mapping[str, Any], settings: Settings) -> Table:
    kinds = {
        "vision_tokens": "embeddings",
        "language_model": "keys, values in it",
        "prefusion": "in pre-fusion",
        "features": "vision features",
    }
    return Table(
        title=f"What a frame keeps for the language model, and for a later question, {settings.size}, "
        f"{settings.dtype}: measured (counted)",
        columns=("way", *kinds.values()),
        rows=[
            (name, *(f"{scaled(one['kept'][kind], 'B')} ({scaled(one['counted'][kind], 'B')})" for kind in kinds))
            for name, one in ways.items()
        ],
    )


def _peak_table(ways: Mapping[str, Any], settings: Settings) -> Table:
    return Table(
        title=f"The most that the first token of an answer needs above the weights, {settings.size}, {settings.dtype}",
        columns=("way", "frames", "measured", "estimated before loading"),
        rows=[
            (name, frames, _words(one["peak"].get(frames, "not measured")), scaled(estimate, "B"))
            for name, one in ways.items()
            for frames, estimate in one["estimated"].items()
        ],
    )


def _words(peak: int | str | None) -> str:
    return "out of memory" if peak is None else peak if isinstance(peak, str) else scaled(peak, "B")
