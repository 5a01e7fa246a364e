"""A small LLaVA-Mini with pre-fusion to be tuned by one process or several, and what can go wrong with it."""

import os
import resource
import signal
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from llava_mini.data.quarantine import Damaged
from llava_mini.flow import ModelInputs
from llava_mini.training.idle_frames import with_idle_frame
from llava_mini.training.run_log import RunLog, read_log
from llava_mini.training.sharding import EngineSettings
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import Losses, PhaseSettings, train_phase
from tests.tiny_models import IMAGE_TOKEN, VOCABULARY, tiny_model

STAGE = Stage(
    name="stage-2",
    rules=(
        Rule(part=r"vision_tower\.", rate=0.0),
        Rule(part=r"language_model\.", rate=1e-3),
        Rule(part=r"(projector|reducer)\.", rate=3e-3),
        Rule(part=r"prefusion\.", rate=2e-3),
    ),
)


@dataclass(frozen=True)
class Micro:
    inputs: ModelInputs
    ids: tuple[str, ...]
    damaged: tuple[Damaged, ...] = ()
    crash: str = ""


@dataclass(frozen=True)
class Draw:
    """Micro-batches of two prompts, ``joined`` of them to one; every third holds text alone, and lengths differ."""

    joined: int = 1
    faults: tuple[tuple[int, str], ...] = ()
    """By number of the micro-batch."""
    tokens: int = 1
    """Of a frame."""
    fingerprint: str = ""

    def __call__(self, index):
        prompts = [self.prompt(number, row) for number in self.numbers(index) for row in range(2)]
        ids, labels, frames = zip(*prompts, strict=True)
        masks = [torch.ones_like(row) for row in ids]
        frames = [row for row in frames if row is not None]
        inputs = ModelInputs(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=3),
            attention_mask=pad_sequence(masks, batch_first=True),
            pixel_values=torch.cat(frames) if frames else None,
            labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        )
        names = tuple(f"drawn/{number}-{row}" for number in self.numbers(index) for row in range(2))
        return self.with_fault(Micro(inputs, names), dict(self.faults).get(index, ""))

    def numbers(self, index):
        return range(index * self.joined, (index + 1) * self.joined)

    def prompt(self, number, row):
        rng = torch.Generator().manual_seed(1000 * number + row)
        text, answer = (
            torch.randint(4, VOCABULARY, (int(torch.randint(2, 7, (1,), generator=rng)),), generator=rng)
            for _ in range(2)
        )
        num_frames = 0 if number % 3 == 2 else 1 + row * (number % 2)
        ids = torch.cat([torch.full((num_frames * self.tokens,), IMAGE_TOKEN), text, answer])
        labels = torch.cat([torch.full((len(ids) - len(answer),), -100), answer])
        frames = torch.randn(num_frames, 1, 3, 8, 8, generator=rng) if num_frames else None
        return ids, labels, frames

    def with_fault(self, micro, fault):
        inputs = micro.inputs
        if fault == "damaged":
            return replace(micro, damaged=(Damaged(id=f"{micro.ids[0]}x", media="a.png", reason="torn"),))
        if fault == "silent":
            return replace(micro, inputs=replace(inputs, labels=torch.full_like(inputs.labels, -100)))
        if fault == "nan":
            return replace(micro, inputs=replace(inputs, pixel_values=torch.full_like(inputs.pixel_values, torch.nan)))
        if fault == "unreadable":
            raise ValueError(f"{micro.ids[0]} cannot be read.")
        if fault == "worker":
            raise ChildProcessError("A process that makes batches died.")
        return replace(micro, crash=fault)


class Tuning:
    """The task."""

    def __init__(self, *, spread, dtype=torch.float32, model=None, **draw):
        self.module = tiny_model(**(model or {})).to(dtype)
        self.make_batch = Draw(**draw, tokens=self.module.config.tokens_per_frame)
        self.spread = spread

    def weight(self, batch):
        return float((batch.inputs.labels[:, 1:] != -100).sum())

    def losses(self, batch):
        if batch.crash == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if batch.crash == "bug":
            raise ZeroDivisionError("one of these")
        if batch.crash == "disk full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        inputs = batch.inputs
        if self.spread or self.module.prefusion is None:
            inputs = with_idle_frame(inputs, self.module.config, torch.device("cpu"))
        fused = self.module.fuse(inputs)
        language_model = self.module.language_model
        output = language_model.model(
            inputs_embeds=fused.inputs_embeds,
            attention_mask=fused.attention_mask,
            use_cache=False,
            **self.module.inside(fused),
        )
        targets = fused.labels[:, 1:]
        chosen = targets != -100
        logits = language_model.lm_head(output.last_hidden_state[:, :-1][chosen]).float()
        total = functional.cross_entropy(logits, targets[chosen], reduction="sum") / max(int(chosen.sum()), 1)
        return Losses(total=total * 0 if batch.crash == "zero" else total)


def train(world, folder, engine=None, task=None, stop_after=-1, interruption=None, **fields):
    """Train a phase of six steps, and return its log: (loss, length of the gradient) of each step."""
    log = RunLog(folder, terminal=(folder.parent / "progress").open("a"), silent=not world.is_first)
    settings = PhaseSettings(
        **{
            "name": "stage-2",
            "num_steps": 6,
            "stage": STAGE,
            "log_every": 1,
            "checkpoint_seconds": 0.0 if stop_after > 0 or (task or {}).get("faults") else 1e6,
            "keep_last": 2,
            "max_damaged_share": 0.002,
            "engine": EngineSettings(**(engine or {})),
            **fields,
        }
    )
    tuned = Tuning(spread=world.size > 1, **(task or {}))
    train_phase(tuned, settings, folder / "stage-2", log, world=world, interruption=interruption, stop_after=stop_after)
    return measured(folder)


def measured(folder) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in read_log(folder / "log.jsonl")]


def fresh_model() -> Any:
    """A model of the same sizes with other weights."""
    return tiny_model(seed=7)
