"""Reading all data once before training does: what there is, what is damaged, and what would be learned.

Each record goes the way that training takes it, through the same collator, in as many processes as there are cores.
What training would leave out is found here, with the reason, hours earlier.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_mini.config import LlavaMiniConfig
from llava_mini.data.crash_proof import Died, results
from llava_mini.data.mixture import Mixture
from llava_mini.data.published import published_set
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import KINDS, Kind, Sample
from llava_mini.data.tuning_batch import IGNORED, MAX_FRAMES, TuningCollator
from llava_mini.flow import ModelInputs
from llava_mini.model.splice import fusible
from llava_mini.processor.processor import LlavaMiniProcessor

Fault = Literal["record", "media", "prompt", "crash"]
"""What is wrong: the record is malformed; a file is missing or damaged; the prompt teaches nothing or is too long; or
something that nobody foresaw went wrong while it was read, which would have ended training."""

FAULTS: dict[Fault, str] = {
    "record": "malformed records",
    "media": "missing or damaged files",
    "prompt": "prompts that teach nothing or are too long",
    "crash": "crashes",
}

_WORTH_A_POOL = 4000
"""Fewest records for which starting further processes saves time: it takes 2.6 s on one core of an EPYC, checking a
picture of 96 pixels 1.4 ms."""
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What one record is."""

    number: int
    """In the mixture."""
    kind: Kind
    tokens: int = 0
    """Of the prompt, those of frames included; 0 if it is damaged."""
    vision: int = 0
    """Tokens of frames."""
    learned: int = 0
    """Tokens with a label."""
    is_cut: bool = False
    """Whether the prompt was longer than the most tokens."""
    folder: str = ""
    """First folder of the path of its first file; empty where there is none."""
    fault: Fault | None = None
    damaged: Damaged | None = None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What all records are."""

    records: tuple[Checked, ...]
    """In the order of the mixture."""
    differences: tuple[str, ...] = ()
    """What is not as it was published."""

    @property
    def kinds(self) -> dict[Kind, int]:
        """How many records there are of each kind, damaged ones included."""
        counts = Counter(record.kind for record in self.records)
        return {kind: counts[kind] for kind in KINDS}

    @property
    def damaged(self) -> list[Damaged]:
        """What training would leave out."""
        return [record.damaged for record in self.records if record.damaged is not None]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is damaged, and all is as it was published."""
        return not self.damaged and not self.differences

    def text(self) -> str:
        """Return the report for people: least to most are tokens of a prompt, learned are tokens of all prompts."""
        sound = [record for record in self.records if record.damaged is None]
        heads = ("least", *(f"{share:.0%}" for share in _QUANTILES[1:-1]), "most")
        lines = [_row("", "records", "sound", *heads, "learned", "cut")]
        for kind in KINDS:
            found = [record for record in sound if record.kind == kind]
            if self.kinds[kind]:
                lines.append(_row(kind, self.kinds[kind], len(found), *_summary(found)))
        lines.append(_row("all", len(self.records), len(sound), *_summary(sound)))
        faults = Counter(record.fault for record in self.records if record.fault is not None)
        lines += ["", f"damaged: {sum(faults.values())} of {len(self.records)}"]
        for fault, words in FAULTS.items():
            if faults[fault]:
                lines.append(f"  {words}: {faults[fault]}")
                first = [str(record.damaged) for record in self.records if record.fault == fault][:_EXAMPLES]
                lines += [f"    {line}" for line in first]
        lines += [f"not as published: {difference}" for difference in self.differences]
        return "\n".join(lines)


_EXAMPLES = 5
"""Damaged records of each fault that a report names."""


@dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """Checks records by number. Can be pickled."""

    mixture: Mixture
    collator: TuningCollator

    def __call__(self, number: int) -> Checked:
        """Read a record and its media as training does."""
        kind = KINDS[self.mixture.kinds[number]]
        try:
            sample = self.mixture[number]
        except ValueError as error:
            damaged = Damaged(id=self.mixture.id_of(number), media="", reason=str(error))
            return Checked(number=number, kind=kind, fault="record", damaged=damaged)
        found = Checked(number=number, kind=sample.kind, folder=self._folder(number, sample))
        try:
            batch = self.collator([sample])
        except Exception as error:  # training would end here, so a check must name it and go on
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            return replace(found, fault="crash", damaged=Damaged(id=sample.id, media="", reason=reason))
        if batch.damaged:
            fault = "media" if batch.damaged[0].media else "prompt"
            return replace(found, fault=fault, damaged=batch.damaged[0])
        assert batch.inputs is not None
        mask = batch.inputs.attention_mask
        assert mask is not None
        ids = batch.inputs.input_ids
        return replace(
            found,
            tokens=int(mask.sum()),
            vision=int((ids == self.collator.processor.image_token_id).sum()),
            learned=batch.num_supervised,
            is_cut=bool(batch.cut),
        )

    def _folder(self, number: int, sample: Sample) -> str:
        source = int(np.searchsorted(self.mixture.first, number, side="right")) - 1
        if not sample.media or not isinstance(path := sample.media[0].source, Path):
            return ""
        folder = self.mixture.files[source].folder
        parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
        return parts[0] if len(parts) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What is checked, and how."""

    num_frames: int | None = None
    """Frames of each video, evenly spread."""
    fps: float | None = None
    """Frames of a video per second. None, and no ``num_frames``: one."""
    max_frames: int = MAX_FRAMES
    """Most frames of a video."""
    max_length: int | None = None
    """Most tokens of a prompt. None: the model's context."""
    captions: bool = False
    """Whether questions are left out."""
    published: str | None = None
    """The published set that this should be, a name in ``PUBLISHED_SETS``. None: whatever it is."""
    examples: int = 3
    """How many samples are shown."""
    processes: int | None = None
    """How many read at a time. None: one per core, or one alone for few records. With more than one, a file that ends
    the process that reads it is damaged; with one it ends this process."""

    def __post_init__(self) -> None:
        for name in ("examples", "processes"):
            value, least = getattr(self, name), int(name == "processes")
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more.")
        if self.published is not None:
            published_set(self.published)


class DataCheck:
    """Reads every record and all its media once."""

    def __init__(
        self, mixture: Mixture, processor: LlavaMiniProcessor, config: LlavaMiniConfig, settings: CheckSettings
    ) -> None:
        """Prepare a check.

        Args:
            mixture: The records.
            processor: The model's.
            config: The model's.
            settings: What is asked for.
        """
        self.mixture, self.config, self.settings = mixture, config, settings
        self.collator = TuningCollator(
            processor,
            num_frames=settings.num_frames,
            fps=settings.fps,
            max_frames=settings.max_frames,
            max_length=settings.max_length or config.text.max_position_embeddings,
            captions=settings.captions,
        )

    def run(self, progress: Callable[[int], object] = lambda count: None) -> CheckReport:
        """Read.

        Args:
            progress: Is told how many more records were read.

        Raises:
            ChildProcessError: Processes do not start, or die one after the other.
        """
        processes = self.settings.processes
        if processes is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            processes = cores if len(self.mixture) >= _WORTH_A_POOL else 1
        check = RecordCheck(mixture=self.mixture, collator=self.collator)
        found: dict[int, Checked] = {}
        with closing(results(check, len(self.mixture), processes=processes)) as reading:
            for number, result in reading:
                found[number] = _crashed(self.mixture, number, result) if isinstance(result, Died) else result
                progress(1)
        report = CheckReport(records=tuple(found[number] for number in range(len(self.mixture))))
        if self.settings.published is None:
            return report
        folders = Counter(record.folder for record in report.records if record.folder)
        published = published_set(self.settings.published)
        return replace(report, differences=tuple(published.differences(report.kinds, folders)))

    def examples(self, report: CheckReport) -> list[str]:
        """Return some sound samples, the first of each kind among them, with what happens to their words."""
        sound = [record for record in report.records if record.damaged is None]
        firsts = {record.kind: record.number for record in reversed(sound)}
        chosen = [firsts[kind] for kind in KINDS if kind in firsts][: self.settings.examples]
        rest = [record.number for record in sound if record.number not in chosen]
        wanted = min(self.settings.examples - len(chosen), len(rest))
        chosen += [rest[len(rest) * place // wanted] for place in range(wanted)]
        return [self._shown(self.mixture[number]) for number in sorted(chosen)]

    def _shown(self, sample: Sample) -> str:
        lines = [f"{sample.id} ({sample.kind}: {', '.join(map(str, sample.media)) or 'no media'})"]
        inputs = self.collator([sample]).inputs
        assert inputs is not None
        for mark, text in marked_text(inputs, self.collator.processor.tokenizer, self.config):
            for number, line in enumerate(text.split("\n")):
                lines.append(f"  {mark if number == 0 else '':<8}| {line}")
        return "\n".join(lines)


def _crashed(mixture: Mixture, number: int, died: Died) -> Checked:
    how = f"signal {-died.code}" if died.code < 0 else f"exit code {died.code}"
    reason = f"The process that read it died ({how}). Is one of its files damaged, or memory short?"
    damaged = Damaged(id=mixture.id_of(number), media="", reason=reason)
    return Checked(number=number, kind=KINDS[mixture.kinds[number]], fault="crash", damaged=damaged)


def write_quarantine(path: Path, damaged: Sequence[Damaged]) -> None:
    """Write what was left out as JSON lines, as a ``QuarantineLog`` does; the file appears when it is complete.

    A list of an earlier check is replaced: what was mended since is not on it.
    """
    draft = path.with_name(f"{path.name}.part")
    draft.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in damaged), encoding="utf-8")
    draft.replace(path)


Mark = Literal["plain", "fused", "vision", "learned"]
"""What happens to a token: it is only read; it is fused with the frames; it is a frame; it is learned."""


def marked_text(
    inputs: ModelInputs, tokenizer: PreTrainedTokenizerBase, config: LlavaMiniConfig
) -> list[tuple[Mark, str]]:
    """Return one prompt as runs of text, each with what happens to its tokens.

    Args:
        inputs: Of one prompt, with labels.
        tokenizer: The model's.
        config: The model's; it says what is fused.
    """
    assert inputs.labels is not None
    assert inputs.attention_mask is not None
    length = int(inputs.attention_mask[0].sum())
    ids = inputs.input_ids[0, :length]
    is_vision = ids == config.image_token_id
    fused = fusible(
        inputs,
        image_token_id=cast(int, config.image_token_id),
        fuse_token_id_zero=config.fuse_token_id_zero,
        fuse_answers=config.fuse_answers,
    )[0, :length]
    fused &= bool(is_vision.any()) and config.prefusion_num_layers > 0
    learned = inputs.labels[0, :length] != IGNORED
    runs: list[tuple[Mark, list[int]]] = []
    for token, *facts in zip(ids.tolist(), is_vision.tolist(), learned.tolist(), fused.tolist(), strict=True):
        names: tuple[Mark, ...] = ("vision", "learned", "fused", "plain")
        mark: Mark = next(name for name, holds in zip(names, (*facts, True), strict=True) if holds)
        if runs and runs[-1][0] == mark:
            runs[-1][1].append(token)
        else:
            runs.append((mark, [token]))
    return [(mark, _count(tokens) if mark == "vision" else str(tokenizer.decode(tokens))) for mark, tokens in runs]


def _count(tokens: Sequence[int]) -> str:
    return f"{len(tokens)} token{'s' * (len(tokens) > 1)}"


def _summary(records: Sequence[Checked]) -> list[object]:
    """Quantiles of the tokens, tokens that are learned, and prompts that are cut."""
    tokens = [record.tokens for record in records]
    spread = [int(value) for value in np.quantile(tokens, _QUANTILES, method="nearest")] if tokens else ["-"] * 5
    return [*spread, sum(record.learned for record in records), sum(record.is_cut for record in records)]


def _row(first: str, *cells: object) -> str:
    return f"{first:<12}" + "".join(f"{cell!s:>10}" for cell in cells)
