"""What latency compares: models that all read one image and the same words before one language model.

A prompt is [kept words | image | question]. The first question runs all of it. For a later one everything that
does not depend on the question is at hand: the language model's keys and values of the kept words and the image,
and what the front end itself can keep. A front end whose image tokens read the question keeps less.

Shapes: S rows of the prompt, Q image tokens, T text tokens, D language width; one prompt, so B = 1.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from llava_mini.benchmarks.released import fuse_as_released
from llava_mini.benchmarks.timing import Laps
from llava_mini.flow import KeysValues, ModelInputs
from llava_mini.inference.torch_backend import PREFILL_TOKENS
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Words:
    """The text of the prompts: random ids."""

    kept: Tensor
    """[1, T]: before the image, the same for all questions."""
    question: Tensor
    """[1, T]: after the image."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A prompt that was read: what the next token needs."""

    token: Tensor
    """[1, 1] int64: the likeliest next token."""
    cache: Cache


class Contestant(Protocol):
    """A model that answers questions about one image."""

    name: str
    tokens: int
    """What the image costs the language model."""

    def first(self, laps: Laps) -> Answering:
        """From pixels and ids to the first token of the answer to the first question."""
        ...

    def keep(self) -> Any:
        """Make what a later question may use: all that does not depend on it."""
        ...

    def later(self, kept: Any, laps: Laps) -> Answering:
        """From the ids of another question to the first token of its answer; ``kept`` stays as it is."""
        ...

    def step(self, answering: Answering) -> Answering:
        """One more token of the answer."""
        ...


class LanguageModel:
    """The half of a contestant that all but one share: a causal language model that reads embeddings."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, ids: Tensor) -> Tensor:
        """[1, T] to [1, T, D]."""
        return self.model.get_input_embeddings()(ids)

    def read(self, embeds: Tensor, cache: Cache | None = None) -> Answering:
        """Read rows [1, S, D] after those of ``cache``, which stays as it is; many rows in pieces."""
        past = DynamicCache() if cache is None else branch(cache)
        *pieces, last = embeds.split(PREFILL_TOKENS, dim=1)
        for piece in pieces:
            self.model.get_decoder()(inputs_embeds=piece, past_key_values=past, use_cache=True)
        out = self.model(inputs_embeds=last, past_key_values=past, use_cache=True, logits_to_keep=1)
        return Answering(token=out.logits[:, -1:].argmax(-1), cache=out.past_key_values)

    def step(self, answering: Answering) -> Answering:
        """Read the token that came last; its row is added to the cache in place."""
        out = self.model(input_ids=answering.token, past_key_values=answering.cache, use_cache=True)
        return Answering(token=out.logits[:, -1:].argmax(-1), cache=out.past_key_values)


def branch(cache: Cache) -> Cache:
    """A cache that goes on from ``cache`` and leaves it as it is; what both hold is stored once."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made


@dataclass(frozen=True, kw_only=True)
class KeptFrames:
    """What this model keeps of an image for later questions."""

    keys_values: tuple[KeysValues, ...]
    """Of vision rows and kept words in pre-fusion."""
    prefix: Answering
    """The language model after kept words and image."""


class Ours:
    """LLaVA-Mini in the order of this package: vision once, text after it, no row that nobody reads."""

    def __init__(self, name: str, model: LlavaMiniForConditionalGeneration, pixels: Tensor, words: Words) -> None:
        self.name, self.model, self.pixels, self.words = name, model, pixels, words
        self.tokens = model.config.tokens_per_frame
        self.language = LanguageModel(model.language_model)

    def first(self, laps: Laps) -> Answering:
        """Vision, reduction, two passes of pre-fusion, language model."""
        kept, question = self.language.embed(self.words.kept), self.language.embed(self.words.question)
        patches, reduced = self._vision(laps)
        fused = self.model.read(patches, reduced, torch.cat([kept, question], dim=1))
        laps("pre-fusion")
        assert fused.vision is not None
        assert fused.text is not None
        before, after = fused.text.split([kept.shape[1], question.shape[1]], dim=1)
        answering = self.language.read(torch.cat([before, fused.vision, after], dim=1))
        laps("prefill")
        return answering

    def keep(self) -> KeptFrames:
        """Vision and kept words, which never see the question."""
        laps = Laps(device=self.pixels.device, by_part=False)
        seen = self.model.read_first(*self._vision(laps), self.language.embed(self.words.kept)[0])
        prefix = self.language.read(torch.cat([seen.text, seen.vision], dim=1))
        return KeptFrames(keys_values=seen.keys_values, prefix=prefix)

    def later(self, kept: KeptFrames, laps: Laps) -> Answering:
        """The question's rows alone, in pre-fusion and in the language model."""
        text = self.model.read_again(kept.keys_values, self.language.embed(self.words.question))
        laps("pre-fusion")
        answering = self.language.read(text, kept.prefix.cache)
        laps("prefill")
        return answering

    def step(self, answering: Answering) -> Answering:
        """One more token."""
        return self.language.step(answering)

    def _vision(self, laps: Laps) -> tuple[Tensor | None, Tensor]:
        features = self.model.encode_frames(self.pixels)
        laps("vision")
        patches, reduced = self.model.reduce_frames(features)
        laps("reduction")
        return patches, reduced


class OursAsReleased(Ours):
    """LLaVA-Mini in the order of the released code, which keeps nothing for a later question."""

    def first(self, laps: Laps) -> Answering:
        """Everything, frame by frame."""
        config = self.model.config
        image = torch.full((1, self.tokens), config.image_token_id or 0, device=self.pixels.device)
        ids = torch.cat([self.words.kept, image, self.words.question], dim=1)
        inputs = ModelInputs(input_ids=ids, pixel_values=self.pixels)
        fused = fuse_as_released(self.model, inputs, laps)
        answering = self.language.read(fused.inputs_embeds)
        laps("prefill")
        return answering

    def keep(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing."""

    def later(self, kept: None, laps: Laps) -> Answering:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Everything again."""
        return self.first(laps)
