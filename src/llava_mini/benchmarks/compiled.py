"""LLaVA-Mini with ``torch.compile``: what would be gained by it, and by CUDA graphs, and what it costs to begin.

The engine does not compile: a first answer would wait for it. This contestant measures whether it should.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache

from llava_mini.benchmarks.contestants import Answering, LanguageModel, Ours, Words
from llava_mini.benchmarks.sizes import with_parts
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

ANSWER_TOKENS = 64
"""Room for the answer in a cache of fixed length."""


class OursCompiled(Ours):
    """The layers of vision tower and pre-fusion compiled one by one; each token of an answer is one compiled step.

    On a GPU that step is a CUDA graph over a cache of fixed length.
    """

    def __init__(self, name: str, model: LlavaMiniForConditionalGeneration, pixels: Tensor, words: Words) -> None:
        super().__init__(name, compiled(model), pixels, words)
        rows = words.kept.shape[1] + words.question.shape[1] + self.tokens
        self.language = CompiledSteps(model.language_model, rows + ANSWER_TOKENS)


class CompiledSteps(LanguageModel):
    """A language model whose prompt is read as usual, and whose answer is made in compiled steps."""

    def __init__(self, model: Any, length: int) -> None:
        """Nothing is compiled yet.

        Args:
            model: the language model.
            length: rows that prompt and answer may have.
        """
        super().__init__(model)
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self._step = torch.compile(_next_token, mode=mode)

    def step(self, answering: Answering) -> Answering:
        """One more token. The keys and values of the prompt move into the fixed cache before the first."""
        cache = answering.cache if isinstance(answering.cache, StaticCache) else self._fixed(answering.cache)
        token = self._step(self.model, answering.token, cache)
        return Answering(token=token.clone(), cache=cache)  # the next run of a graph writes over what it gave

    def _fixed(self, cache: Cache) -> StaticCache:
        """The same memory for every answer, which ends the one before: for another a CUDA graph is recorded anew."""
        self._cache.reset()
        for index, layer in enumerate(cache.layers):
            self._cache.update(cast(Any, layer).keys, cast(Any, layer).values, index)
        return self._cache


def compiled(model: LlavaMiniForConditionalGeneration) -> LlavaMiniForConditionalGeneration:
    """A model that runs compiled layers of vision tower and pre-fusion, and shares all weights with ``model``."""
    tower = model.vision_tower
    encoder = with_parts(tower.encoder, layers=_compiled_layers(tower.encoder.layers))
    parts: dict[str, nn.Module] = {"vision_tower": with_parts(tower, encoder=encoder)}
    if model.prefusion is not None:
        parts["prefusion"] = with_parts(model.prefusion, layers=_compiled_layers(model.prefusion.layers))
    return with_parts(model, **parts)


def _compiled_layers(layers: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(cast(nn.Module, torch.compile(layer)) for layer in layers)


def _next_token(model: Any, token: Tensor, cache: StaticCache) -> Tensor:
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
