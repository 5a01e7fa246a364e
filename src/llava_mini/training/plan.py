"""What a training will take, before it starts: parameters and rates, steps and tokens, memory and work.

Everything follows from the configuration, so it can be told for any number of devices without having them, and for
models whose weights are not here. Parameters and steps are exact. Work counts matrix products, 2 for each multiply-add,
as ``model.cost`` does. Memory is an estimate: states are counted, activations follow from the shapes of what is kept.

A layer costs its forward pass once; as much again if a gradient passes through it to what comes before, once more if
its weights train, and once more if its activations are computed again on the way back. Attention has no weights: on the
way back it costs twice.

Shapes: F frames, P patches, Q reduced tokens, T text tokens, D language width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import get_args

import torch

from llava_mini.config import LlavaMiniConfig
from llava_mini.inference.memory import meta_model
from llava_mini.model.cost import ByPart, flops, prefusion_bytes_per_frame, rows_of_layers
from llava_mini.model.reducers import REDUCERS
from llava_mini.training.instruction import ROWS_AT_A_TIME
from llava_mini.training.lora import LoraSettings, add_lora
from llava_mini.training.sharding import Strategy
from llava_mini.training.stages import Stage
from llava_mini.training.tuning_stages import PARTS, Rates, tuning_stage

TRAINED_BYTES = 16
"""Bytes of each parameter that trains: in float32 the weight (4), its gradient (4) and two moments (8). With arithmetic
in 16 bits, a device that trains alone keeps weight and gradient in these, too."""

STORED_BYTES = 12
"""Those of them that a checkpoint holds: no gradient."""


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How large a sample is."""

    frames: int
    """Images, and frames of its videos."""
    text_tokens: int
    """Tokens of the prompt that are words, answers included."""
    supervised_tokens: int
    """Those among them that are learned."""

    def __post_init__(self) -> None:
        if min(self.frames, self.text_tokens, self.supervised_tokens) < 0 or self.text_tokens == 0:
            raise ValueError(f"A sample has 0 or more frames and at least one word, got {self}.")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What trains, and how it is divided."""

    number: int = 1
    """Devices, one process on each."""
    strategy: Strategy = "none"
    micro_batch: int = 1
    """Samples of a device that go through the model together."""
    checkpointing: bool = True
    """Whether activations are computed again on the way back."""

    def __post_init__(self) -> None:
        if self.number < 1 or self.micro_batch < 1:
            raise ValueError(f"A plan needs at least 1 device and 1 sample on it, got {self}.")
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy is {self.strategy!r}; choose one of {', '.join(get_args(Strategy))}.")
        if self.strategy == "none" and self.number > 1:
            raise ValueError(
                f"{self.number} devices need the strategy ddp, where each holds the whole model, or fsdp, where each "
                "holds a part of it."
            )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    frozen: int
    """Weights that do not train."""
    trained: int
    """Weights that do, with gradients, copies and moments."""
    passing: int
    """Layers that are put together while they run, and their gradients."""
    activations: int
    """What a micro-batch keeps for the way back, and the largest layer at work."""

    @property
    def total(self) -> int:
        """All together."""
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """One part of the model."""

    name: str
    parameters: int
    trained: int
    """How many of them train."""
    rates: tuple[float, ...]
    """Peak rates above 0, ascending; empty if it is frozen."""

    @property
    def in_words(self) -> str:
        """What happens to it."""
        return " and ".join(f"{rate:g}" for rate in self.rates) if self.rates else "frozen"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training will take."""

    title: str
    parts: tuple[PartPlan, ...]
    devices: Devices
    batch: int
    """Samples of a step, of all devices."""
    memory: Memory
    work_per_sample: float
    """Operations, mean over the samples."""
    tokens_per_sample: float
    """What the language model reads, mean over the samples: words and tokens of frames."""
    num_samples: int | None = None
    """Samples of an epoch. None: not known."""
    num_steps: int | None = None
    measured_on: int = 0
    """How many samples of the data the means are taken over. 0: they are assumed."""

    @property
    def accumulate(self) -> int:
        """Micro-batches of a device in a step."""
        return ceil(self.batch / (self.devices.number * self.devices.micro_batch))

    @property
    def work_per_step(self) -> float:
        """Operations of all devices in a step."""
        return self.batch * self.work_per_sample

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint on disk: of each parameter that trains, the weight and two moments in float32."""
        return STORED_BYTES * sum(part.trained for part in self.parts)

    def hours(self, teraflops: float) -> float:
        """How long the steps take if each device does so many 10^12 operations a second.

        Raises:
            ValueError: The number of steps is not known, or the speed is not above 0.
        """
        if self.num_steps is None or not teraflops > 0:
            raise ValueError(f"Hours need a number of steps and a speed above 0, got {self.num_steps} and {teraflops}.")
        return self.num_steps * self.work_per_step / (self.devices.number * teraflops * 1e12) / 3600

    def __str__(self) -> str:
        """Return the plan as a text for the terminal."""
        device = "1 device" if self.devices.number == 1 else f"{self.devices.number} devices ({self.devices.strategy})"
        lines = [f"{self.title}, on {device}", "", f"{'part':<16}{'parameters':>18}{'trained':>18}   rate"]
        for part in self.parts:
            lines.append(f"{part.name:<16}{part.parameters:>18,}{part.trained:>18,}   {part.in_words}")
        total, trained = (sum(getattr(part, name) for part in self.parts) for name in ("parameters", "trained"))
        lines += [f"{'total':<16}{total:>18,}{trained:>18,}", ""]
        per_device = f"{self.devices.micro_batch} x {self.accumulate} on each device"
        steps = "" if self.num_steps is None else f"{self.num_steps:,} steps of "
        samples = "" if self.num_samples is None else f"; {self.num_samples:,} samples in an epoch"
        lines.append(f"steps     {steps}{self.batch} samples ({per_device}){samples}")
        source = f"measured on {self.measured_on} samples" if self.measured_on else "assumed"
        tokens = f"{self.tokens_per_sample:.0f} a sample ({source})"
        if self.num_steps is not None:
            tokens += f", {_scaled(self.tokens_per_sample * self.batch * self.num_steps)} in all"
        lines.append(f"tokens    {tokens}")
        memory = self.memory
        lines.append(
            f"memory    about {_gigabytes(memory.total)} a device: frozen weights {_gigabytes(memory.frozen)}, what "
            f"trains {_gigabytes(memory.trained)}, layers at work {_gigabytes(memory.passing)}, activations "
            f"{_gigabytes(memory.activations)}"
        )
        lines.append(f"disk      {_gigabytes(self.checkpoint_bytes)} a checkpoint")
        work = f"{_scaled(self.work_per_step)}FLOP a step"
        if self.num_steps is not None:
            work += f", {_scaled(self.work_per_step * self.num_steps)}FLOP in all"
        lines.append(f"work      {work}")
        return "\n".join(lines)


def make_plan(
    title: str,
    config: LlavaMiniConfig,
    rates: Rates,
    *,
    devices: Devices,
    batch: int,
    sizes: Sequence[SampleSize],
    num_samples: int | None = None,
    num_steps: int | None = None,
    measured_on: int = 0,
    lora: LoraSettings | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> TrainingPlan:
    """Plan a stage.

    Args:
        title: First words of the text.
        config: Of the model that trains.
        rates: Of its parts.
        devices: What trains.
        batch: Samples of a step, of all devices.
        sizes: Of some samples that stand for all.
        num_samples: Samples of an epoch.
        num_steps: Of the stage.
        measured_on: How many samples of the data ``sizes`` are; 0: they are assumed.
        lora: Low-rank updates.
        dtype: Number format of the arithmetic.

    Raises:
        ValueError: There are no sizes, or the batch is not a multiple of what the devices take at a time.
    """
    if not sizes:
        raise ValueError("A plan needs the sizes of some samples, got none.")
    together = devices.number * devices.micro_batch
    if batch % together:
        raise ValueError(
            f"A batch of {batch} samples cannot be divided among {devices.number} device(s) that take "
            f"{devices.micro_batch} at a time. Choose a multiple of {together}."
        )
    model = meta_model(config)
    if lora is not None:
        add_lora(model, lora)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stage = tuning_stage(title, counts, rates)
    four_bit = lora is not None and lora.four_bit
    return TrainingPlan(
        title=title,
        parts=_parts(counts, stage),
        devices=devices,
        batch=batch,
        memory=_memory(config, counts, stage, devices, sizes, dtype, four_bit=four_bit),
        work_per_sample=sum(training_flops(config, rates, one, devices.checkpointing, lora).total for one in sizes)
        / len(sizes),
        tokens_per_sample=sum(one.text_tokens + one.frames * config.tokens_per_frame for one in sizes) / len(sizes),
        num_samples=num_samples,
        num_steps=num_steps,
        measured_on=measured_on,
    )


def training_flops(
    config: LlavaMiniConfig,
    rates: Rates,
    sample: SampleSize,
    checkpointing: bool = True,
    lora: LoraSettings | None = None,
) -> ByPart:
    """Operations of one sample, forward and back, without those of low-rank updates themselves.

    Args:
        config: The model.
        rates: What trains.
        sample: Its size.
        checkpointing: Whether decoder layers are computed again on the way back.
        lora: Low-rank updates: the matrices that they are added to need no gradients of their own.
    """
    if not REDUCERS[config.reducer].drops_in_training:
        config = LlavaMiniConfig.from_dict({**config.to_dict(), "reducer": "identity"})
    asked = max(sample.text_tokens - sample.supervised_tokens, 1)  # answers are not fused
    forward = flops(config, num_frames=sample.frames, num_text_tokens=sample.text_tokens)
    fusion = flops(config, num_frames=sample.frames, num_text_tokens=asked).prefusion
    seen, width = config.vision.hidden_size, config.text.hidden_size  # only the second layer of the projector passes
    head = 2 * config.text.hidden_size * config.text.vocab_size  # of the last position, which ``flops`` counts
    of_vision = sample.frames > 0 and any((rates.projector, rates.reducer))  # a gradient is wanted before pre-fusion
    trains = {"prefusion": rates.prefusion > 0, "language_model": rates.language_model > 0}
    low = {"prefusion": False, "language_model": False}
    if lora is not None:
        low = {"prefusion": lora.prefusion, "language_model": True}
    full = {part: trains[part] and not low[part] for part in trains}
    passes = {part: full[part] or low[part] for part in full}
    passes["prefusion"] |= of_vision or full["language_model"]  # whose embeddings of words it reads
    passes["language_model"] |= of_vision or (sample.frames > 0 and passes["prefusion"])

    def there_and_back(part: str, work: int, attention: int) -> int:
        again = int(checkpointing and passes[part])
        linear = (work - attention) * (1 + passes[part] + full[part] + again)
        return linear + attention * (1 + 2 * passes[part] + again)

    pairs = sum(rows**2 for rows in rows_of_layers(config, sample.frames, sample.text_tokens))
    language_model = there_and_back("language_model", forward.language_model - head, _attention(config, pairs))
    return ByPart(
        vision_tower=forward.vision_tower,
        reducer=forward.reducer * (3 if rates.reducer else 1),
        projector=forward.projector * (2 if rates.projector else 1) + forward.projector * width // (width + seen),
        prefusion=there_and_back("prefusion", fusion, _fusion_attention(config, sample.frames, asked)),
        language_model=language_model + sample.supervised_tokens * head * (2 + full["language_model"]),
    )


def _attention(config: LlavaMiniConfig, pairs: int) -> int:
    """Operations of attention between so many pairs of rows in one layer."""
    heads = config.text.num_attention_heads
    width = getattr(config.text, "head_dim", None) or config.text.hidden_size // heads
    return 4 * pairs * heads * width


def _fusion_attention(config: LlavaMiniConfig, num_frames: int, words: int) -> int:
    """Operations of attention in pre-fusion: the vision rows among themselves, then the words against all."""
    layers = config.prefusion_num_layers
    if not layers or not num_frames:
        return 0
    passing = config.vision_tokens_from == "prefusion"
    outputs = config.tokens_per_frame if passing else 0
    rows = config.patches_per_frame + (outputs if config.reducer != "identity" else 0)
    pairs = (layers - 1) * rows**2 + outputs * rows + layers * words * (rows + words)
    return num_frames * _attention(config, pairs)


def _parts(counts: Mapping[str, int], stage: Stage) -> tuple[PartPlan, ...]:
    found = []
    for part in PARTS:
        own = {name: count for name, count in counts.items() if name.startswith(f"{part}.")}
        if not own:
            continue
        rates = {name: stage.rate_of(name) for name in own}
        found.append(
            PartPlan(
                name=part,
                parameters=sum(own.values()),
                trained=sum(count for name, count in own.items() if rates[name] > 0),
                rates=tuple(sorted({rate for rate in rates.values() if rate > 0})),
            )
        )
    return tuple(found)


def _memory(
    config: LlavaMiniConfig,
    counts: Mapping[str, int],
    stage: Stage,
    devices: Devices,
    sizes: Sequence[SampleSize],
    dtype: torch.dtype,
    *,
    four_bit: bool,
) -> Memory:
    trained = sum(count for name, count in counts.items() if stage.rate_of(name) > 0)
    rounded = 2 * dtype.itemsize if devices.strategy == "none" and dtype != torch.float32 else 0
    frozen = float(dtype.itemsize * (sum(counts.values()) - trained))
    if four_bit:  # half a byte for each, and a scale of one byte for 64 of them
        packed = sum(count for name, count in counts.items() if ".base_layer." in name and "language_model" in name)
        frozen -= (dtype.itemsize - 0.5 - 1 / 64) * packed
    parts = devices.number if devices.strategy == "fsdp" else 1
    passing = 0
    if devices.strategy != "none":
        layers: dict[str, int] = {}
        for name, count in counts.items():
            layers[_unit(name)] = layers.get(_unit(name), 0) + count
        root = layers.pop("", 0)
        passing = 2 * dtype.itemsize * (root + 2 * max(layers.values(), default=0))
    return Memory(
        frozen=int(frozen / parts),
        trained=int((TRAINED_BYTES + rounded) * trained / parts),
        passing=passing,
        activations=_activations(config, devices, sizes, dtype),
    )


def _unit(name: str) -> str:
    """What is put together with a parameter when it runs: its layer, or all that stands in none."""
    before, found, after = name.partition(".layers.")
    if found:
        return f"{before}.{after.partition('.')[0]}"
    part = name.partition(".")[0]
    return part if part in ("projector", "reducer") else ""


def _activations(config: LlavaMiniConfig, devices: Devices, sizes: Sequence[SampleSize], dtype: torch.dtype) -> int:
    """Bytes of the largest micro-batch: what is kept for the way back, and the largest layer at work."""
    text = config.text
    frames = max(one.frames for one in sizes) * devices.micro_batch
    words = max(one.text_tokens for one in sizes)
    rows = devices.micro_batch * words + frames * config.tokens_per_frame
    fused = frames * (config.patches_per_frame + config.tokens_per_frame + words) if config.prefusion_num_layers else 0
    width, inner = text.hidden_size, text.intermediate_size
    layer = 10 * width + 4 * inner  # norms, queries, keys, values and outputs, and the MLP's four, for each row
    if devices.checkpointing:
        kept = (text.num_hidden_layers * rows + config.prefusion_num_layers * fused) * width + layer * max(rows, fused)
    else:
        kept = (text.num_hidden_layers * rows + config.prefusion_num_layers * fused) * layer
    projected = 3 * frames * (config.patches_per_frame + config.tokens_per_frame) * width
    keys_values = frames * prefusion_bytes_per_frame(config, str(dtype).removeprefix("torch."))
    tower = frames * config.views_per_frame * (config.patches_per_side**2 + 1)
    seeing = tower * (5 * config.vision.hidden_size + 2 * config.vision.intermediate_size)
    supervised = devices.micro_batch * max(one.supervised_tokens for one in sizes)
    logits = (dtype.itemsize + 8) * min(supervised, ROWS_AT_A_TIME) * text.vocab_size  # and in float32, and a gradient
    return dtype.itemsize * max(kept + projected, seeing) + keys_values + logits


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _scaled(number: float) -> str:
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.0f} "
