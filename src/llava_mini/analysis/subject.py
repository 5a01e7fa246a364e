"""A model to be analysed: a front end that makes embeddings of a question, before a plain language model.

Shapes: S tokens of a prompt, D language width, V vision tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava_mini.analysis.attention_stats import AttentionRecorder, AttentionStats, token_parts
from llava_mini.analysis.canvas import Canvas
from llava_mini.analysis.kernels import MOST_WEIGHTS, kernel_in, watching
from llava_mini.analysis.samples import Asked
from llava_mini.analysis.words import TINY, Word, WordReads, word_rows


@dataclass(frozen=True, kw_only=True)
class FusionReads:
    """What the text of a prompt read in pre-fusion, over all frames."""

    stats: AttentionStats
    """From ``TEXTS`` to ``SOURCES``."""
    words: tuple[WordReads, ...]
    """Words of the question, over the frames that are shown."""


@dataclass(frozen=True, kw_only=True)
class QueryLook:
    """Where the compression queries looked in one frame."""

    picture: np.ndarray
    """uint8 [height, width, 3]."""
    maps: Tensor
    """[Q, rows, columns], each adds up to 1."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A question as the language model reads it."""

    embeds: Tensor
    """[S, D]."""
    is_vision: Tensor
    """[S] bool."""
    tokens_of_frames: list[int]
    """How many vision tokens each image or frame has."""
    write: Callable[[int], list[int]]
    """Returns the ids of the greedy answer, of at most so many."""
    arguments: Callable[[], dict[str, Any]] = dict
    """What the language model is given besides embeddings, made anew for each reading."""
    words: tuple[Word, ...] = ()
    """Of the text after the first vision token."""
    canvases: tuple[Canvas, ...] = ()
    """Of the first frames."""
    fusion: FusionReads | None = None
    """None: the model has no pre-fusion."""
    looks: tuple[QueryLook, ...] = ()
    """Of the first frames; empty if nothing is compressed by attention."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen while the language model read a prompt with its answer."""

    stats: AttentionStats
    """Between ``PARTS``."""
    words: tuple[WordReads, ...]
    """Words of the question, over the first picture; empty if vision tokens have no places in it."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to be analysed."""

    name: str
    family: str
    """``LLaVA-Mini``, ``LLaVA-1.5`` or ``LLaVA-NeXT``."""
    decoder: PreTrainedModel
    """The language model without its head."""
    stop_ids: tuple[int, ...]
    """They end an answer."""
    tokenizer: PreTrainedTokenizerBase
    prompt: Callable[[Asked], Prompted]
    reads_videos: bool
    context: int
    """Most tokens of prompt and answer."""
    details: dict[str, object] = field(default_factory=dict)
    """For the page: what sets this model apart from others of its family."""

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention of each layer.

        Raises:
            ValueError: The language model is not made of decoder layers as those of Llama are.
        """
        layers = getattr(self.decoder, "layers", None)
        found = [getattr(layer, "self_attn", None) for layer in layers or ()]
        if not found or None in found:
            raise ValueError(
                f"The language model of {self.name!r} is a {type(self.decoder).__name__}, whose layers have no "
                "self_attn. Use a model like Llama, Vicuna, Mistral or Qwen."
            )
        return [module for module in found if module is not None]

    def answer(self, prompted: Prompted, max_tokens: int) -> tuple[int, ...]:
        """Return the ids of the greedy answer, without the one that ends it."""
        row = prompted.write(min(max_tokens, self.context - len(prompted.embeds)))
        return tuple(row[: next((place for place, token in enumerate(row) if token in self.stop_ids), len(row))])

    def ids_of(self, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer that somebody wrote."""
        return tuple(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def text_of(self, ids: tuple[int, ...]) -> str:
        """Return an answer in words."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def watch(self, prompted: Prompted, answer: tuple[int, ...], most_weights: int = MOST_WEIGHTS) -> Watched:
        """Let the language model read a prompt with its answer, and look at its attention.

        Args:
            prompted: From ``prompt``.
            answer: Tokens that follow it.
            most_weights: As in ``kernels.watching``.
        """
        device = prompted.embeds.device
        written = torch.tensor(answer, dtype=torch.long, device=device)
        embeds = torch.cat([prompted.embeds, self.decoder.get_input_embeddings()(written)])  # [S, D]
        parts = token_parts(prompted.is_vision, len(answer))
        rows = torch.cat([parts, word_rows(prompted.words, len(embeds)).to(device)])  # [PARTS + words, S]
        recorder = AttentionRecorder(rows, parts, len(self.attentions))
        watched = {module: recorder.listener(layer) for layer, module in enumerate(self.attentions)}
        with kernel_in(self.decoder, watching(watched, most_weights)), torch.inference_mode():
            self.decoder(inputs_embeds=embeds[None], use_cache=False, **prompted.arguments())
        stats = recorder.stats()
        of_words = stats.received[:, len(parts) :, : len(prompted.is_vision)][..., prompted.is_vision.cpu()]
        return Watched(stats=stats.of(len(parts)), words=_word_reads(prompted, of_words))


def _word_reads(prompted: Prompted, received: Tensor) -> tuple[WordReads, ...]:
    """Lay what each word attends to, [L, words, V], over the first picture."""
    paint = prompted.canvases[0].paint if prompted.canvases else None
    if paint is None:
        return ()
    reads = []
    for word, layers in zip(prompted.words, received.unbind(1), strict=True):
        maps = torch.stack([paint(values) for values in layers])  # [L, rows, columns]
        share = maps.sum((1, 2))
        maps = maps / share[:, None, None].clamp(min=TINY)
        reads.append(WordReads(word=word.text, share=share[None], maps=maps[None]))
    return tuple(reads)
