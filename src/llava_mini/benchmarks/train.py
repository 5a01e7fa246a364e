"""Time and memory of a step of training, there and back.

Question: what do two passes of pre-fusion, logits of learned positions alone and kept vision features save of a step
          of stage 2, and what do kept features save of stage 1, where all patches go to the language model?
Expected: stage 2 saves the rows of the answers in pre-fusion, a sixth of its vision rows and the last layer of the
          tower; kept features save the tower, which runs one way only; memory falls by the logits. The language model
          is the same in all orders and most of the work.
Run:      llava-mini bench train --size middle --samples 2

The orders of work are in ``train_ways.py``. A step is loss and gradients of one micro-batch of images, on the device.
The update of the weights is the same in all orders and left out unless ``update`` asks for it, since in full
precision it takes 16 bytes for each parameter that trains. Peaks come from processes of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llava_mini.benchmarks.film_ways import all_tokens_config, without_reduction
from llava_mini.benchmarks.floors import measure_rates
from llava_mini.benchmarks.peaks import peak_in_process, peak_of
from llava_mini.benchmarks.report import Report, Table, scaled, told, tupled
from llava_mini.benchmarks.sizes import limit_memory, random_model, size_config
from llava_mini.benchmarks.timing import drained, take_turns
from llava_mini.benchmarks.train_ways import ORDERS, OrderName, SampleText, make_batch, make_loss, recompute
from llava_mini.evaluation.environment import environment
from llava_mini.inference.devices import DTYPES, choose_device, choose_dtype, keep_freed_memory
from llava_mini.model import cost
from llava_mini.training.lora import LoraSettings, add_lora
from llava_mini.training.optimizer import MasterAdamW, OptimizerSettings
from llava_mini.training.plan import SampleSize, training_flops
from llava_mini.training.stages import apply_stage
from llava_mini.training.tuning_stages import STAGE_1, STAGE_2, tuning_stage

CAPTION_TOKENS = 24
"""Words of a caption, in stage 1."""
_RATES = {1: STAGE_1, 2: STAGE_2}
_Way = tuple[int, str, OrderName]
"""Stage, whether layers are computed again, order of work."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    size: str = "middle"
    """tiny, middle, 7b or 8b."""
    stages: tuple[int, ...] = (1, 2)
    """Stage 1 trains the projector with all patches in the language model, stage 2 all but the vision tower."""
    samples: int = 4
    """Images of a step, each with its text."""
    text_tokens: int = 150
    """Words before the answer, in stage 2."""
    answer_tokens: int = 150
    """Words of the answer, in stage 2."""
    recompute: tuple[str, ...] = ("no", "yes")
    """Whether layers are computed again on the way back, to keep less: no, yes, or both."""
    low_rank: int = 0
    """Rank of low-rank updates of the language model, in stage 2. 0: none, and it trains in full."""
    update: bool = False
    """The weights are updated too."""
    repeats: int = 3
    """Rounds that are counted."""
    warmup: int = 1
    """Rounds before them that are not."""
    device: str | None = None
    """None: the fastest there is."""
    dtype: str | None = None
    """None: what suits the device."""
    memory_limit: float | None = None
    """GiB of the GPU's memory that may be used. None: all."""

    def __post_init__(self) -> None:
        size_config(self.size)
        for name, known in (("stages", [1, 2]), ("recompute", ["no", "yes"])):
            given = list(getattr(self, name))
            if not given or len(set(given)) != len(given) or not {*given} <= {*known}:
                raise ValueError(f"{name} are one or both of {known[0]} and {known[1]}, each once; got {given}.")
        least = {"samples": 1, "text_tokens": 0, "answer_tokens": 1, "low_rank": 0, "repeats": 1, "warmup": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}.")

    def text(self, stage: int) -> SampleText:
        """The words of a sample."""
        if stage == 1:
            return SampleText(asked=0, answered=CAPTION_TOKENS)
        return SampleText(asked=self.text_tokens, answered=self.answer_tokens)


def run(settings: Settings) -> Report:
    """Measure the peaks, then all orders in turns.

    Raises:
        ValueError: the device, the number format or the memory limit cannot be, or the model does not fit.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device, cost.parameters(size_config(settings.size)).total)
    settings = replace(settings, device=str(device), dtype=str(dtype).removeprefix("torch."))
    limit_memory(settings.memory_limit, device)
    asked: list[_Way] = [
        (stage, again, order) for stage in settings.stages for again in settings.recompute for order in ORDERS
    ]
    peaks = {way: peak_in_process("train", {"settings": vars(settings), "way": way}) for way in asked}
    rates = measure_rates(device, dtype)
    steps: dict[_Way, list[dict[str, float]]] = {}
    for stage in settings.stages:
        trained = _Trained(stage, settings, device)
        losses = {order: trained.loss_of(order) for order in ORDERS}
        rounds = {
            way: partial(trained.step, losses[way[2]], way[2], again=way[1] == "yes")
            for way in asked
            if way[0] == stage
        }
        steps |= take_turns(rounds, warmup=settings.warmup, repeats=settings.repeats)
        del trained, losses, rounds  # before the model of the next stage is made
    results = {
        "ways": [
            {
                "stage": stage,
                "recompute": again,
                "order": order,
                "seconds": [one["seconds"] for one in steps[stage, again, order]],
                "loss": [one["loss"] for one in steps[stage, again, order]],
                "peak": peaks[stage, again, order],
            }
            for stage, again, order in asked
        ],
        "flops": {str(stage): _flops(stage, settings) for stage in settings.stages},
        "flops_per_second": rates.operations,
    }
    return Report(
        bench="train",
        environment=environment(device, dtype),
        settings=vars(settings),
        results=results,
        tables=tables(results, settings),
    )


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    place = "device" if any("device" in (one["peak"] or {}) for one in results["ways"]) else "host"
    rows = []
    for one in results["ways"]:
        work = settings.samples * results["flops"][str(one["stage"])]
        seconds, peak = one["seconds"], one["peak"]
        share = f"{work / median(seconds) / results['flops_per_second']:.0%}" if seconds else "-"
        speed = f"{settings.samples / median(seconds):.2f}" if seconds else "-"
        held = scaled(peak[place], "B") if peak else "out of memory"
        rows.append((str(one["stage"]), one["recompute"], one["order"], told(seconds), speed, share, held))
    work = ", ".join(f"{scaled(flops, 'FLOP')} in stage {stage}" for stage, flops in results["flops"].items())
    low = f", updates of rank {settings.low_rank}" if settings.low_rank else ""
    return [
        Table(
            title=f"A step with {settings.samples} images, {settings.size}, {settings.dtype}{low}; work of a sample "
            f"without computing again: {work}; the device multiplies {scaled(results['flops_per_second'], 'FLOP')} "
            f"a second; peak of the {place} above the weights",
            columns=("stage", "again", "order", "s, median (quartiles)", "samples/s", "of the device", "peak"),
            rows=rows,
            left=("again", "order"),
        )
    ]


def peak_here(wanted: Mapping[str, Any]) -> dict[str, int] | None:
    """Bytes that a step adds at most to what is held before it. For a process of its own.

    Args:
        wanted: ``settings`` and ``way``, which is stage, whether layers are computed again, and order.
    """
    keep_freed_memory()
    settings = Settings(**tupled(wanted["settings"]))
    assert settings.device is not None
    stage, again, order = wanted["way"]
    device = torch.device(settings.device)
    limit_memory(settings.memory_limit, device)
    trained = _Trained(stage, settings, device)
    loss_of = trained.loss_of(order)
    return peak_of(lambda: trained.step(loss_of, order, again=again == "yes"), device)


class _Trained:
    """A model in a stage, and a batch for it."""

    def __init__(self, stage: int, settings: Settings, device: torch.device) -> None:
        assert settings.dtype is not None
        model = random_model(size_config(settings.size), device, DTYPES[settings.dtype])
        self.model = model = without_reduction(model) if stage == 1 else model
        if stage == 2 and settings.low_rank:
            add_lora(model, _lora(settings))
        names = [name for name, _ in model.named_parameters()]
        groups = apply_stage(model.named_parameters(), tuning_stage(str(stage), names, _RATES[stage]))
        self.optimizer = MasterAdamW(groups, OptimizerSettings()) if settings.update else None
        self.inputs = make_batch(model.train(), settings.samples, settings.text(stage))

    def loss_of(self, order: OrderName) -> Callable[[], Tensor]:
        """What an order computes in every step; features that are kept are made here."""
        return make_loss(order, self.model, self.inputs)

    def step(self, loss_of: Callable[[], Tensor], order: OrderName, *, again: bool) -> dict[str, float]:
        """One step: its seconds and its loss."""
        recompute(self.model, order, again)
        since = drained(self.model.device)
        loss = loss_of()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step(1.0)
        seconds = drained(self.model.device) - since
        self.model.zero_grad(set_to_none=True)
        return {"seconds": seconds, "loss": float(loss.detach())}


def _flops(stage: int, settings: Settings) -> int:
    """Operations of a sample there and back."""
    config, text = size_config(settings.size), settings.text(stage)
    sample = SampleSize(frames=1, text_tokens=text.asked + text.answered, supervised_tokens=text.answered)
    if stage == 1:
        config = all_tokens_config(config)
    lora = _lora(settings) if stage == 2 and settings.low_rank else None
    return training_flops(config, _RATES[stage], sample, checkpointing=False, lora=lora).total


def _lora(settings: Settings) -> LoraSettings:
    return LoraSettings(rank=settings.low_rank, alpha=2.0 * settings.low_rank)
