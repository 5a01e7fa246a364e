"""From samples to the tensors of a step of instruction tuning, through the model's own processor.

Labels come from the processor's mask of answers, token by token: nothing is looked for in the text. What cannot be
read is left out of its batch and named there.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_mini.data.collate import LENGTH_STEP
from llava_mini.data.features import FeatureStore
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import MediaFile, Sample
from llava_mini.flow import ModelInputs
from llava_mini.model.splice import widen
from llava_mini.processor.image import existing_file
from llava_mini.processor.media_stream import MediaStream
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.video import FrameSampling

IGNORED = -100
"""The label of tokens that are not learned."""
MAX_LENGTH = 2048
"""Most tokens of a prompt by default, those of frames included."""
MAX_FRAMES = 32
"""Most frames of a video by default."""


@dataclass(frozen=True, kw_only=True)
class TuningBatch:
    """One micro-batch. B prompts with F frames in all."""

    inputs: ModelInputs | None
    """Padded at the right, with labels at the answers and their ends, -100 elsewhere. None: every sample is damaged."""
    ids: tuple[str, ...] = ()
    """[B]: of the samples."""
    damaged: tuple[Damaged, ...] = ()
    """Samples that were left out."""
    cut: tuple[str, ...] = ()
    """Ids of the samples that were longer than ``max_length``, among ``ids``."""

    @property
    def num_samples(self) -> int:
        """How many samples were asked for, the damaged ones included."""
        return len(self.ids) + len(self.damaged)

    @property
    def num_supervised(self) -> int:
        """How many tokens are learned: those with a label after the first of a prompt, which nothing predicts."""
        if self.inputs is None or self.inputs.labels is None:
            return 0
        return int((self.inputs.labels[:, 1:] != IGNORED).sum())


class TuningCollator:
    """Turns samples into a batch."""

    def __init__(
        self,
        processor: LlavaMiniProcessor,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        max_frames: int | None = MAX_FRAMES,
        max_length: int | None = None,
        captions: bool = False,
        features: FeatureStore | None = None,
    ) -> None:
        """Make a collator for one model.

        Args:
            processor: The model's.
            num_frames: Frames of each video, evenly spread, instead of so many per second.
            fps: Frames of a video per second. By default one.
            max_frames: Most frames of a video, then evenly spread. None: no limit.
            max_length: Most tokens of a prompt. A longer one is cut at its end, as in the released training, where that
                leaves all frames and something to learn; else the sample is damaged. None: no limit.
            captions: Whether questions are left out, so that answers follow their media: stage 1 of LLaVA, with the
                template ``plain``.
            features: Of all images, computed before: then samples with images alone are not decoded. Batches must not
                mix these with films.

        Raises:
            ValueError: A number is too small, or ``num_frames`` and ``fps`` are both given.
        """
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be 1 or more.")
        self.processor = processor
        self.sampling = FrameSampling(num_frames=num_frames, fps=fps, max_frames=max_frames)
        self.max_length = max_length
        self.captions = captions
        self.features = features

    def __call__(self, samples: Sequence[Sample | Damaged]) -> TuningBatch:
        """Return the batch of some samples; every answer has labels. What is damaged already stays so.

        Raises:
            ValueError: Some show films and others images whose features are stored.
        """
        read = [sample if isinstance(sample, Damaged) else self._read(sample) for sample in samples]
        rows = [row for row in read if isinstance(row, _Row)]
        damaged = tuple(row for row in read if isinstance(row, Damaged))
        if not rows:
            return TuningBatch(inputs=None, damaged=damaged)
        frames = [frames for row in rows for frames in row.frames]
        stored = {row.is_stored for row in rows if row.frames}
        if len(stored) > 1:
            raise ValueError(
                "A batch holds films, and images whose features are stored. Make batches of one kind, as "
                "BatchOrder does."
            )
        seen = torch.cat(frames) if frames else None
        return TuningBatch(
            inputs=ModelInputs(
                input_ids=_padded([row.ids for row in rows], self._pad_token_id),
                attention_mask=_padded([torch.ones_like(row.ids) for row in rows], 0),
                answer_mask=_padded([row.answers.long() for row in rows], 0),
                pixel_values=None if True in stored else seen,  # [F, V, 3, S, S]
                features=seen if True in stored else None,  # [F, V, patches, E]
                labels=_padded([row.ids.masked_fill(~row.answers, IGNORED) for row in rows], IGNORED),
            ),
            ids=tuple(row.id for row in rows),
            damaged=damaged,
            cut=tuple(row.id for row in rows if row.is_cut),
        )

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)

    def _read(self, sample: Sample | Damaged) -> "_Row | Damaged":
        if isinstance(sample, Damaged):
            return sample
        at = _At()
        try:
            with ExitStack() as files:
                return self._row(sample.captioned() if self.captions else sample, at, files)
        except ValueError as error:
            return Damaged(id=sample.id, media=at.media, reason=_one_line(error, at.written))

    def _row(self, sample: Sample, at: "_At", files: ExitStack) -> "_Row":
        """One prompt with its frames. Says in ``at`` which medium it looks at."""
        media = []
        for medium in sample.media:
            at.media = str(medium)
            media.append(_on_disk(medium, at, files))
        at.media = ""
        inputs = self.processor.stream(
            replace(sample, media=tuple(media)).conversation(),
            num_frames=self.sampling.num_frames,
            fps=self.sampling.fps,
            max_frames=self.sampling.max_frames,
            add_generation_prompt=False,
            whole=True,
        )
        store = self.features if all(medium.kind == "image" for medium in sample.media) else None
        frames = []
        for number, medium in enumerate(sample.media):
            at.media = str(medium)
            assert isinstance(inputs.pixel_values, MediaStream)
            if store is not None:
                frames.append(store.read(medium)[None])  # [1, V, patches, E]
                continue
            chunks = inputs.pixel_values.chunks(number)
            frames.append(torch.cat([chunk.pixel_values for chunk in chunks]))  # [F, V, 3, S, S]
        at.media = ""
        assert inputs.answer_mask is not None
        ids, answers = inputs.input_ids, inputs.answer_mask.bool()  # [1, T], one token for each medium
        if frames:
            is_image = ids == self.processor.image_token_id
            copies = [len(pixels) * self.processor.tokens_per_frame for pixels in frames]
            ids, answers = widen(ids, is_image, copies), widen(answers, is_image, copies)  # [1, T], Q for each frame
        ids, answers = ids[0], answers[0]  # [T]
        is_cut = self.max_length is not None and len(ids) > self.max_length
        if is_cut:
            lost = int((ids[self.max_length :] == self.processor.image_token_id).sum())
            if lost or not answers[: self.max_length].any():
                lacking = f"{lost} tokens of its frames" if lost else "all its answers"
                raise ValueError(
                    f"The sample has {len(ids)} tokens, more than max_length={self.max_length}; cut there it lacks "
                    f"{lacking}. Raise max_length, or lower max_frames."
                )
            ids, answers = ids[: self.max_length], answers[: self.max_length]
        if not answers[1:].any():
            raise ValueError("No token of the sample would be learned. Does the chat template show its answers?")
        is_stored = store is not None
        return _Row(id=sample.id, ids=ids, answers=answers, frames=frames, is_cut=is_cut, is_stored=is_stored)


class Samples(Protocol):
    """Samples by number: a ``Mixture``."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples."""
        ...

    def sample(self, index: int) -> Sample | Damaged:
        """Return a sample, or what is wrong with it."""
        ...


class Order(Protocol):
    """Which samples a micro-batch holds: a ``BatchOrder``."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal orders."""
        ...

    def batches(self, index: int) -> Sequence[int]:
        """Return the samples of micro-batch ``index``, counted over the whole run."""
        ...


@dataclass(frozen=True, kw_only=True)
class TuningBatches:
    """The micro-batches of a run by number: what a task gives the trainer as ``make_batch``. Can be pickled."""

    samples: Samples
    order: Order
    collator: TuningCollator

    @property
    def fingerprint(self) -> str:
        """Equal for the same samples in the same order: what a run that goes on compares."""
        return f"{self.samples.fingerprint} {self.order.fingerprint}"

    def __call__(self, index: int) -> TuningBatch:
        """Return micro-batch ``index``, counted over the whole run."""
        return self.collator([self.samples.sample(number) for number in self.order.batches(index)])


@dataclass
class _At:
    """What is being read."""

    media: str = ""
    """Which medium, in words; empty for none."""
    written: list[Path] = field(default_factory=list)
    """Files that bytes of the sample were written to."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A prompt. T tokens."""

    id: str
    ids: Tensor
    """[T] int64, Q image tokens for each frame."""
    answers: Tensor
    """[T] bool."""
    frames: list[Tensor]
    """[F, V, 3, S, S] of each medium, or its features, [1, V, patches, E]."""
    is_cut: bool
    is_stored: bool
    """Whether ``frames`` are features."""


def _one_line(error: ValueError, written: Sequence[Path]) -> str:
    """What is wrong, without line ends and names of files that nobody else knows."""
    text = " ".join(str(error).split())
    for path in written:
        text = text.replace(repr(str(path)), "of the record")
    return text


def _on_disk(medium: MediaFile, at: _At, files: ExitStack) -> MediaFile:
    """The medium, if its file exists; the bytes of a film as a file, which FFmpeg can go back and forth in."""
    if medium.kind == "video" and isinstance(medium.source, bytes):
        path = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="llava-mini-"))) / "film"
        path.write_bytes(medium.source)
        at.written.append(path)
        return MediaFile(kind="video", source=path)
    if not isinstance(medium.source, bytes) and not str(medium.source).startswith("data:"):
        existing_file(medium.source, medium.kind)
    return medium


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """[B, T], T the longest row, rounded up to a multiple of ``LENGTH_STEP``."""
    longest = max(len(row) for row in rows)
    whole = rows[0].new_full((-(-longest // LENGTH_STEP) * LENGTH_STEP,), value)
    return pad_sequence([*rows, whole], batch_first=True, padding_value=value)[:-1]
