"""From records to the tensors of a training step, through the model's own processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from llava_mini.data.changes import CHANGES, FACTS, IGNORED, FrameChange, changes_of
from llava_mini.data.records import Noun, Record
from llava_mini.flow import ModelInputs
from llava_mini.processor.processor import LlavaMiniProcessor

MAX_NAMES = 4
"""What the one token of a frame shall tell of each thing is asked of pictures with at most so many names."""
LENGTH_STEP = 8
"""Batches are padded to a multiple of so many tokens: few lengths, so that kernels made for one are used again."""


@dataclass(frozen=True, kw_only=True)
class NounTokens:
    """Where the prompts of a batch name things, and what those things are.

    N names in questions about images; all tensors have this length.
    """

    prompts: Tensor
    """[N] int64: which prompt."""
    tokens: Tensor
    """[N] int64: the last token of the name."""
    present: Tensor
    """[N] int64: 1 where there is such a thing."""
    places: Tensor
    """[N, 2] float32: x and y of the thing, as shares of width and height; 0 where there is none."""
    facts: dict[str, Tensor]
    """[N] int64 for each property: the number of its value, ``IGNORED`` where there is none."""


@dataclass(frozen=True, kw_only=True)
class ClipNouns:
    """Where questions about clips name things, and the trajectory of those things. N names."""

    prompts: Tensor
    """[N] int64: which prompt."""
    tokens: Tensor
    """[N] int64: the last token of the name."""
    trajectories: Tensor
    """[N, 6] float32, each from 0 to 1: x and y where the thing is first seen, x and y where it is last seen, and the
    first and the last frame that show it, as shares of the way from the first frame of the clip to its last."""


@dataclass(frozen=True, kw_only=True)
class FrameThings:
    """What images and frames of clips show. M pairs of a frame and a name."""

    prompts: Tensor
    """[M] int64: which prompt."""
    tokens: Tensor
    """[M, Q] int64: the tokens of the frame."""
    names: Tensor
    """[M, 2] int64: ids of the two words that name a thing."""
    present: Tensor
    """[M] int64: 1 where the frame shows such a thing."""
    places: Tensor
    """[M, 2] float32: x and y of the thing in this frame, as shares of width and height; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class ShownThings:
    """All that the frames of clips show. N frames and K things in them."""

    prompts: Tensor
    """[N] int64: which prompt."""
    tokens: Tensor
    """[N, Q] int64: the tokens of the frame."""
    frames: Tensor
    """[K] int64: which of the N frames."""
    facts: dict[str, Tensor]
    """[K] int64 for each property: the number of its value."""


@dataclass(frozen=True, kw_only=True)
class FrameChanges:
    """What is new in the frames of clips against the frame before. N frames; the first of a clip has none before it."""

    prompts: Tensor
    """[N] int64: which prompt."""
    tokens: Tensor
    """[N, Q] int64: the tokens of the frame."""
    facts: dict[str, Tensor]
    """[N] int64 for each of ``changes.CHANGES``: the number of its value, ``IGNORED`` where there is no telling."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One step's records as tensors."""

    inputs: ModelInputs
    """With labels at the answers. ``pixel_values`` holds every frame once."""
    frame_sources: Tensor
    """[F] int64: for each frame of the prompts, in order, its row of ``pixel_values``."""
    nouns: NounTokens
    clip_nouns: ClipNouns
    frame_things: FrameThings
    shown_things: ShownThings
    frame_changes: FrameChanges


class Collator:
    """Turns records into a batch."""

    def __init__(self, processor: LlavaMiniProcessor, *, image_token_id: int, tokens_per_frame: int) -> None:
        """Make a collator for one model.

        Args:
            processor: The model's.
            image_token_id: The configuration's id of vision tokens.
            tokens_per_frame: Q.
        """
        self.processor = processor
        self.image_token_id = image_token_id
        self.tokens_per_frame = tokens_per_frame

    def __call__(self, records: Sequence[Record], *, separate: bool = False) -> TrainingBatch:
        """Return the batch of some records; every answer has labels.

        Args:
            records: Conversations, about an image or a video each.
            separate: Whether every turn becomes a prompt of its own, all sharing the frames of their record.

        Raises:
            ValueError: If there are no records.
        """
        if not records:
            raise ValueError("A batch needs at least one record, got none.")
        repeats = [len(record.turns) if separate else 1 for record in records]
        if separate:
            records = [replace(record, turns=(turn,)) for record in records for turn in record.turns]
        tensors = self.processor.apply_chat_template(
            [record.messages() for record in records],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            all_frames=True,
        )
        assert isinstance(tensors, Mapping)
        missing = -tensors["input_ids"].shape[1] % LENGTH_STEP
        pad_token_id = self.processor.tokenizer.pad_token_id
        ids = functional.pad(tensors["input_ids"], (0, missing), value=pad_token_id)
        answers = functional.pad(tensors["answer_mask"], (0, missing)).bool()
        pixels = tensors.get("pixel_values")
        kept, sources = _shared_frames(records, repeats)
        asked = ids.masked_fill(answers, -1)
        inputs = ModelInputs(
            input_ids=ids,
            attention_mask=functional.pad(tensors["attention_mask"], (0, missing)),
            answer_mask=answers.long(),
            pixel_values=None if pixels is None else pixels[kept],
            labels=ids.masked_fill(~answers, IGNORED),
        )
        return TrainingBatch(
            inputs=inputs,
            frame_sources=sources,
            nouns=self._nouns(records, asked),
            clip_nouns=self._clip_nouns(records, asked),
            frame_things=self._frame_things(records, ids, repeats),
            shown_things=self._shown_things(records, ids, repeats),
            frame_changes=self._frame_changes(records, ids, repeats),
        )

    def _nouns(self, records: Sequence[Record], asked: Tensor) -> NounTokens:
        """Find the names of things in questions about images. asked: [B, T], -1 at answers."""
        found: dict[tuple[int, int], Noun] = {}
        for prompt, record in enumerate(records):
            if record.image is None:
                continue
            named = {noun.phrase: noun for turn in record.turns for noun in turn.nouns}
            row = asked[prompt].tolist()
            for phrase in sorted(named, key=len):  # where one name ends another, the longer is meant
                found |= {(prompt, token): named[phrase] for token in self._ends_of(named[phrase], row)}
        places = sorted(found)
        nouns = [found[place] for place in places]
        return NounTokens(
            prompts=torch.tensor([prompt for prompt, _ in places], dtype=torch.long),
            tokens=torch.tensor([token for _, token in places], dtype=torch.long),
            present=torch.tensor([int(bool(noun.path)) for noun in nouns], dtype=torch.long),
            places=torch.tensor([(noun.path and noun.path[0]) or (0.0, 0.0) for noun in nouns]).view(-1, 2),
            facts={
                name: torch.tensor([dict(noun.facts).get(name, IGNORED) for noun in nouns], dtype=torch.long)
                for name in FACTS
            },
        )

    def _clip_nouns(self, records: Sequence[Record], asked: Tensor) -> ClipNouns:
        """Find the names of things in questions about clips. asked: [B, T], -1 at answers."""
        found: list[tuple[int, int, tuple[float, ...]]] = []
        for prompt, record in enumerate(records):
            row = asked[prompt].tolist()
            for noun in record.things if record.video else ():
                found += [(prompt, token, _trajectory(noun)) for token in self._ends_of(noun, row)]
        return ClipNouns(
            prompts=torch.tensor([prompt for prompt, _, _ in found], dtype=torch.long),
            tokens=torch.tensor([token for _, token, _ in found], dtype=torch.long),
            trajectories=torch.tensor([trajectory for _, _, trajectory in found], dtype=torch.float32).view(-1, 6),
        )

    def _frame_things(self, records: Sequence[Record], ids: Tensor, repeats: Sequence[int]) -> FrameThings:
        """Pair each frame with the names of things in its record, in the first of the prompts that share it."""
        found: list[tuple[int, list[int], list[int], tuple[float, float] | None]] = []
        for prompt, frames in self._frames(ids, repeats):
            record = records[prompt]
            for noun in record.things if frames and len(record.things) <= MAX_NAMES else ():
                name = self._ids_of(noun)[-2:]
                found += [(prompt, tokens, name, place) for tokens, place in zip(frames, noun.path, strict=True)]
        places = [place for _, _, _, place in found]
        return FrameThings(
            prompts=torch.tensor([prompt for prompt, _, _, _ in found], dtype=torch.long),
            tokens=torch.tensor([tokens for _, tokens, _, _ in found]).long().view(-1, self.tokens_per_frame),
            names=torch.tensor([name for _, _, name, _ in found], dtype=torch.long).view(-1, 2),
            present=torch.tensor([int(place is not None) for place in places], dtype=torch.long),
            places=torch.tensor([place or (0.0, 0.0) for place in places], dtype=torch.float32).view(-1, 2),
        )

    def _shown_things(self, records: Sequence[Record], ids: Tensor, repeats: Sequence[int]) -> ShownThings:
        """List what each frame of a clip shows, in the first of the prompts that share it."""
        frames: list[tuple[int, list[int]]] = []
        found: list[tuple[int, Noun]] = []
        for prompt, places in self._frames(ids, repeats):
            things = records[prompt].things if records[prompt].video else ()
            for number, tokens in enumerate(places if things else ()):
                found += [(len(frames), noun) for noun in things if noun.path[number] is not None]
                frames.append((prompt, tokens))
        return ShownThings(
            prompts=torch.tensor([prompt for prompt, _ in frames], dtype=torch.long),
            tokens=torch.tensor([tokens for _, tokens in frames]).long().view(-1, self.tokens_per_frame),
            frames=torch.tensor([frame for frame, _ in found], dtype=torch.long),
            facts={
                name: torch.tensor([dict(noun.facts).get(name, IGNORED) for _, noun in found], dtype=torch.long)
                for name in FACTS
            },
        )

    def _frame_changes(self, records: Sequence[Record], ids: Tensor, repeats: Sequence[int]) -> FrameChanges:
        """Find what is new in each frame of a clip, in the first of the prompts that share it."""
        found: list[tuple[int, list[int], FrameChange]] = []
        for prompt, frames in self._frames(ids, repeats):
            record = records[prompt]
            for tokens, change in zip(frames[1:], changes_of(record.things if record.video else ()), strict=False):
                found.append((prompt, tokens, change))
        return FrameChanges(
            prompts=torch.tensor([prompt for prompt, _, _ in found], dtype=torch.long),
            tokens=torch.tensor([tokens for _, tokens, _ in found]).long().view(-1, self.tokens_per_frame),
            facts={name: torch.tensor([change[name] for _, _, change in found], dtype=torch.long) for name in CHANGES},
        )

    def _frames(self, ids: Tensor, repeats: Sequence[int]) -> list[tuple[int, list[list[int]]]]:
        """Return the first of the prompts that share frames, with the tokens of each frame: [frames] of [Q]."""
        found, prompt = [], 0
        for repeat in repeats:
            places = (ids[prompt] == self.image_token_id).nonzero()
            found.append((prompt, places.view(-1, self.tokens_per_frame).tolist()))
            prompt += repeat
        return found

    def _ends_of(self, noun: Noun, row: Sequence[int]) -> list[int]:
        """Return the places of the last token of each mention of a noun in the ids of a prompt."""
        name = self._ids_of(noun)
        return [end - 1 for end in range(len(name), len(row) + 1) if row[end - len(name) : end] == name]

    def _ids_of(self, noun: Noun) -> list[int]:
        return self.processor.tokenizer.encode(f" {noun.phrase}", add_special_tokens=False)


def _trajectory(noun: Noun) -> tuple[float, ...]:
    """Return where and when a thing of a clip is first and last seen: see ``ClipNouns``."""
    seen = [(number, place) for number, place in enumerate(noun.path) if place is not None]
    (first, start), (last, end) = seen[0], seen[-1]
    way = max(len(noun.path) - 1, 1)
    return (*start, *end, first / way, last / way)


def _shared_frames(records: Sequence[Record], repeats: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the frames to keep, and which of them each frame is.

    Args:
        records: Of each prompt.
        repeats: How many prompts, one after the other, share their frames.

    Returns:
        Indices of one copy of each frame, and for each frame of the prompts its row among them.
    """
    kept: list[int] = []
    sources: list[int] = []
    prompt = 0
    for repeat in repeats:
        record = records[prompt]
        count = len(record.video) if record.video else int(record.image is not None)
        rows = list(range(len(kept), len(kept) + count))
        kept += range(len(sources), len(sources) + count)
        sources += rows * repeat
        prompt += repeat
    return torch.tensor(kept, dtype=torch.long), torch.tensor(sources, dtype=torch.long)
