"""What the video benchmark compares: ways from the frames of a film to the first token of an answer.

Each way is asked a first question, and a later one about the same film with all that does not depend on the question
at hand. The frames of a film come from a small pool of random pixels that is shown again and again; the ways that
hold all frames get them in one tensor, the others chunk by chunk, as from a decoder.

Shapes: F frames, V views, Q tokens of a frame, S rows of the prompt, D language width; one prompt, so B = 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llava_mini.benchmarks.contestants import Answering, LanguageModel
from llava_mini.benchmarks.peers import VideoLlavaFront
from llava_mini.benchmarks.released import fuse_as_released
from llava_mini.benchmarks.sizes import changed, random_model, size_config, with_parts
from llava_mini.benchmarks.timing import Laps
from llava_mini.config import LlavaMiniConfig
from llava_mini.flow import ModelInputs, SeenChunk, SeenFrames
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import build_reducer

WayName = Literal["here", "released", "all tokens", "video-llava"]
WAYS: dict[WayName, str] = {
    "here": "LLaVA-Mini, here",
    "released": "LLaVA-Mini, released order",
    "all tokens": "LLaVA-v1.5",
    "video-llava": "Video-LLaVA",
}
"""What is compared, with the names that people read."""

POOL = 8
"""Different frames that are shown again and again, and frames of a chunk."""
WORD = 5
"""The id of every word of the prompts."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """A film and the words around it."""

    frames: int
    """F, at least 1."""
    kept: int
    """Words before the frames, the same for all questions."""
    question: int
    """Words after them, at least 1."""


class Way(Protocol):
    """Answers questions about one film."""

    def first(self, laps: Laps) -> Answering:
        """From pixels and ids on the device to the first token of the answer."""
        ...

    def keep(self) -> Any:
        """All that no question changes. None: nothing is kept, and a later question is the first one again."""
        ...

    def later(self, kept: Any, laps: Laps) -> Answering:
        """From the ids of another question to the first token of its answer; ``kept`` stays as it is."""
        ...

    def step(self, answering: Answering) -> Answering:
        """One more token of the answer."""
        ...


def tokens_of(name: WayName, film: Film, size: str) -> int:
    """What the frames cost the language model."""
    config = size_config(size)
    if name == "all tokens":
        return film.frames * config.patches_per_frame
    if name == "video-llava":
        return film.frames * VideoLlavaFront.tokens_per_frame(config)
    return film.frames * config.tokens_per_frame


def film_model(
    film: Film, size: str, device: torch.device, dtype: torch.dtype, *, most_tokens: int = 0
) -> LlavaMiniForConditionalGeneration:
    """The model that all ways share, with random weights and room for ``most_tokens`` tokens of frames.

    Raises:
        ValueError: it does not fit.
    """
    config = size_config(size)
    positions = max(most_tokens, tokens_of("here", film, size)) + film.kept + film.question + 64
    text = {**config.text.to_dict(), "max_position_embeddings": max(positions, 4096)}
    return random_model(changed(config, text_config=text), device, dtype)


def make_way(name: WayName, film: Film, model: LlavaMiniForConditionalGeneration, *, kept_on_host: bool = False) -> Way:
    """A way of ``model`` or of parts of it.

    Args:
        name: which.
        film: what it is asked about.
        model: shared with other ways.
        kept_on_host: what pre-fusion left of the frames waits in the host's memory for a later question.
    """
    if name == "video-llava":
        return VideoLlava(model, film)
    if name == "released":
        return Released(model, film)
    return Here(without_reduction(model) if name == "all tokens" else model, film, kept_on_host=kept_on_host)


def all_tokens_config(config: LlavaMiniConfig) -> LlavaMiniConfig:
    """LLaVA-v1.5's configuration, which is that of stage 1."""
    return changed(config, reducer="identity", prefusion_num_layers=0)


def without_reduction(model: LlavaMiniForConditionalGeneration) -> LlavaMiniForConditionalGeneration:
    """LLaVA-v1.5 of the same tower, projector and language model."""
    config = all_tokens_config(model.config)
    made = with_parts(model, reducer=build_reducer(config), prefusion=None)
    made.config = config
    return made


@dataclass(frozen=True, kw_only=True)
class KeptFilm:
    """What the engine keeps of a film."""

    pool: SeenFrames
    """Of each frame of the pool, what pre-fusion left."""
    prefix: Answering
    """The language model after the kept words and the frames."""
    length: int
    """Rows of that prefix."""


class Here:
    """The order of this package. A model without reduction and pre-fusion makes it LLaVA-v1.5."""

    def __init__(self, model: LlavaMiniForConditionalGeneration, film: Film, *, kept_on_host: bool = False) -> None:
        self.model, self.film, self.kept_on_host = model, film, kept_on_host
        self.language = LanguageModel(model.language_model)
        config = model.config
        shape = (POOL, config.views_per_frame, 3, config.image_size, config.image_size)
        self.pool = torch.randn(shape, device=model.device, dtype=model.dtype)

    def first(self, laps: Laps) -> Answering:
        """Chunk by chunk: vision, reduction, pre-fusion; then the language model in pieces."""
        prompt = self._prompt(places=1)
        before = self.model.text_before_frames(prompt)
        embeds = self._fused(prompt, self._seen(before, laps), laps)
        answering = self.language.read(embeds)
        laps("prefill")
        return answering

    def keep(self) -> KeptFilm:
        """Vision, and the language model as far as the frames reach."""
        laps, prompt = Laps(device=self.model.device, by_part=False), self._prompt(places=1)
        pool = self.model.see(self.pool, self.model.text_before_frames(prompt))
        if self.kept_on_host:
            pool = pool.to(torch.device("cpu"))
        length = self.film.kept + self.film.frames * self.model.config.tokens_per_frame
        embeds = self._fused(prompt, self._kept(pool), laps)[:, :length]
        return KeptFilm(pool=pool, prefix=self.language.read(embeds), length=length)

    def later(self, kept: KeptFilm, laps: Laps) -> Answering:
        """The question's rows, with every frame in pre-fusion and then in the language model."""
        embeds = self._fused(self._prompt(places=1), self._kept(kept.pool), laps)
        answering = self.language.read(embeds[:, kept.length :], kept.prefix.cache)
        laps("prefill")
        return answering

    def step(self, answering: Answering) -> Answering:
        """One more token."""
        return self.language.step(answering)

    def _fused(self, prompt: ModelInputs, chunks: Iterator[SeenChunk], laps: Laps) -> Tensor:
        fused = self.model.fuse(ModelInputs(input_ids=prompt.input_ids, pixel_values=chunks))
        laps("pre-fusion")
        return fused.inputs_embeds.to(self.model.dtype)  # [1, S, D]

    def _seen(self, before: Tensor, laps: Laps) -> Iterator[SeenChunk]:
        for rows in self._rows():
            features = self.model.encode_frames(self.pool[: len(rows)])
            laps("vision")
            patches, reduced = self.model.reduce_frames(features)
            laps("reduction")
            yield SeenChunk(seen=self.model.read_first(patches, reduced, before), slot=0)
            laps("pre-fusion")

    def _kept(self, pool: SeenFrames) -> Iterator[SeenChunk]:
        for rows in self._rows():
            yield SeenChunk(seen=pool.take([*rows]), slot=0)

    def _rows(self) -> Iterator[range]:
        for start in range(0, self.film.frames, POOL):
            yield range(min(POOL, self.film.frames - start))

    def _prompt(self, places: int) -> ModelInputs:
        """Kept words, places of frames, and a question."""
        image = self.model.config.image_token_id or 0
        ids = [*[WORD] * self.film.kept, *[image] * places, *[WORD] * self.film.question]
        return ModelInputs(input_ids=torch.tensor([ids], device=self.model.device))


class Released(Here):
    """The order of the released code, which holds all frames, runs them one by one, and keeps nothing."""

    def first(self, laps: Laps) -> Answering:
        """Everything, frame by frame."""
        pixels = self.pool[torch.arange(self.film.frames) % POOL]  # all of them at once
        prompt = self._prompt(places=self.film.frames * self.model.config.tokens_per_frame)
        fused = fuse_as_released(self.model, ModelInputs(input_ids=prompt.input_ids, pixel_values=pixels), laps)
        answering = self.language.read(fused.inputs_embeds.to(self.model.dtype))
        laps("prefill")
        return answering

    def keep(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing."""


class VideoLlava:
    """Video-LLaVA's front end as transformers has it, with all frames at once, before a language model of our size."""

    def __init__(self, model: LlavaMiniForConditionalGeneration, film: Film) -> None:
        """Take the language model of ``model``, and leave the rest."""
        self.film, self.language = film, LanguageModel(model.language_model)
        self.front = VideoLlavaFront(model.config, film.frames, model.device, model.dtype)
        self.words = torch.full((1, film.kept + film.question), WORD, device=model.device)

    def first(self, laps: Laps) -> Answering:
        """Vision and projector, then the language model."""
        before, after = self._embeds()
        image = self.front.tokens(laps)
        answering = self.language.read(torch.cat([before, image, after], dim=1))
        laps("prefill")
        return answering

    def keep(self) -> Answering:
        """The language model after kept words and frames."""
        image = self.front.tokens(Laps(device=self.words.device, by_part=False))
        return self.language.read(torch.cat([self._embeds()[0], image], dim=1))

    def later(self, kept: Answering, laps: Laps) -> Answering:
        """The question's rows in the language model."""
        answering = self.language.read(self._embeds()[1], kept.cache)
        laps("prefill")
        return answering

    def step(self, answering: Answering) -> Answering:
        """One more token."""
        return self.language.step(answering)

    def _embeds(self) -> tuple[Tensor, Tensor]:
        before, after = self.language.embed(self.words).split([self.film.kept, self.film.question], dim=1)
        return before, after
