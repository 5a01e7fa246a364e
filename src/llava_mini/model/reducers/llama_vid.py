"""LLaMA-VID: a token for what is asked and tokens for what is there (Li et al., arXiv 2311.17043).

A Q-Former reads the question and the patches. Its queries then look at the patches once more, and the mean of what they
find is the context token, with a map to language width of its own. The content tokens are averages of the patches,
which the projector maps. A frame is [context, content].

What differs from the published code:

- The vision tower is the model's own, where the published one is EVA-ViT-g, and its class token is not read.
- The Q-Former's size follows from the tower's: half of its layers, three quarters of its heads. For CLIP ViT-L that is
  the size of BERT-base, as published. It reads the language model's embeddings of the question through a linear map, in
  place of BERT's own table of word pieces, and starts from random weights instead of InstructBLIP's.
- The map to keys has no bias, which would add the same to a query's product with every patch.

The question changes the context token alone, but the Q-Former mixes it with the patches, so that only the vision tower
is spared for a later question. Two things are done in less work than published, exactly: a query is taken back through
the map to keys, so that no patch is made into one; and the mean over queries is taken of their attention, before
patches are summed.

Shapes: M queries of the Q-Former, W its width, T tokens of a question.
"""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers import initialization as init

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.base import Cost, Question, Reduced, Reducer, cell_means

NUM_QUERIES = 32
MAX_WORDS = 256
"""Tokens of a question that are read. Of a longer one, the last ones."""


class LlamaVid(Reducer):
    """A context token, and ``reducer_grid`` x ``reducer_grid`` content tokens."""

    reads_question: ClassVar[bool] = True

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        sizes, width, language = qformer_sizes(config), config.vision.hidden_size, config.text.hidden_size
        self.queries = nn.Parameter(torch.empty(NUM_QUERIES, sizes.hidden_size))
        self.word_map = nn.Linear(language, sizes.hidden_size)
        self.word_places = nn.Embedding(MAX_WORDS, sizes.hidden_size)
        self.patch_norm = nn.LayerNorm(width)
        kernel = "eager" if config._attn_implementation == "eager" else "sdpa"
        self.encoder = cast(Blip2QFormerModel, Blip2QFormerModel._from_config(sizes, attn_implementation=kernel))
        last = self.encoder.encoder.layer[-1]
        for unread in (last.intermediate, last.output):  # what the last layer makes of the words
            unread.requires_grad_(False)
        self.query_map = nn.Linear(sizes.hidden_size, width)
        self.key_map = nn.Linear(width, width, bias=False)
        self.context_map = nn.Linear(width, language)

    def init_weights(self) -> None:
        """Queries at random."""
        init.normal_(self.queries, mean=0.0, std=0.02)

    def forward(self, patches: Tensor, question: Question) -> Reduced:
        """patches: [F, N, E], N the square of a multiple of ``reducer_grid``."""
        queries = self.query_map(self._read(patches, question))  # [F, M, E]
        probes = queries @ self.key_map.weight  # [F, M, E]
        attention = (probes @ patches.transpose(1, 2) * patches.shape[-1] ** -0.5).softmax(-1)  # [F, M, N]
        attention = attention.mean(1, keepdim=True)  # [F, 1, N]
        context = self.context_map(attention @ patches)  # [F, 1, D]
        grid, one_by_one = self.config.reducer_grid, torch.eye(patches.shape[1], device=patches.device)  # [N, N]
        shares = cell_means(one_by_one[None].to(patches.dtype), grid)  # [1, grid * grid, N]
        attention = torch.cat([attention, shares.expand(len(patches), -1, -1)], dim=1)  # [F, 1 + grid * grid, N]
        return Reduced(cell_means(patches, grid), attention, projected=context)

    def _read(self, patches: Tensor, question: Question) -> Tensor:
        """The queries after the Q-Former, [F, M, W]."""
        words, valid = last_words(question)
        words = self.word_map(words.to(patches.dtype)) + self.word_places.weight[: words.shape[1]]  # [F, T, W]
        rows = torch.cat([self.queries.expand(len(words), -1, -1), words], dim=1)  # [F, M + T, W]
        mask = torch.cat([valid.new_ones(len(words), NUM_QUERIES), valid], dim=1)  # [F, M + T]
        read = self.encoder(
            query_embeds=rows,
            query_length=NUM_QUERIES,
            attention_mask=mask.long(),
            encoder_hidden_states=self.patch_norm(patches),
        )
        return cast(Tensor, read.last_hidden_state)[:, :NUM_QUERIES]

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """The published code makes keys of all patches, and has a table in place of the map of words."""
        sizes, width, language = qformer_sizes(config), config.vision.hidden_size, config.text.hidden_size
        inner, words = sizes.hidden_size, min(max(num_question_tokens, 1), MAX_WORDS)
        patches, rows, layers = config.reduced_patches, NUM_QUERIES + words, sizes.num_hidden_layers
        crossing = -(-layers // sizes.cross_attention_frequency)

        linear = layers * rows * (8 * inner**2 + 4 * inner * sizes.intermediate_size)
        linear += crossing * (4 * NUM_QUERIES * inner**2 + 4 * patches * width * inner)
        linear += 2 * NUM_QUERIES * inner * width + 2 * width * language
        attention = 4 * inner * (layers * rows**2 + crossing * NUM_QUERIES * patches)
        attention += 2 * (NUM_QUERIES * patches + patches) * width

        attending = 4 * (inner**2 + inner) + 2 * inner
        cross_attending = 2 * (inner**2 + inner) + 2 * (width * inner + inner) + 2 * inner
        feeding = 2 * inner * sizes.intermediate_size + sizes.intermediate_size + inner + 2 * inner
        encoder = 2 * inner + layers * (attending + 2 * feeding) + crossing * cross_attending
        maps = (language + width) * inner + inner + width + width**2 + width * language + language
        return Cost(
            parameters=(NUM_QUERIES + MAX_WORDS) * inner + 2 * width + encoder + maps,
            per_frame=linear + attention + 2 * words * language * inner + 2 * NUM_QUERIES * width**2,
            projected=config.reducer_grid**2,
            published=linear + 2 * patches * width**2,
            published_projected=config.reducer_grid**2,
        )


def qformer_sizes(config: LlavaMiniConfig) -> Blip2QFormerConfig:
    """A Q-Former for the tower: BERT-base for CLIP ViT-L."""
    vision = config.vision
    heads = max(3 * vision.num_attention_heads // 4, 1)
    width = heads * vision.hidden_size // vision.num_attention_heads
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=max(vision.num_hidden_layers // 2, 1),
        num_attention_heads=heads,
        intermediate_size=4 * width,
        encoder_hidden_size=vision.hidden_size,
        cross_attention_frequency=2,
        use_qformer_text_input=True,
    )


def last_words(question: Question) -> tuple[Tensor, Tensor]:
    """The last ``MAX_WORDS`` rows of each question, [F, T, D], and which of them there are, [F, T] bool."""
    length = min(question.valid.shape[1], MAX_WORDS)
    first = (question.valid.sum(1, keepdim=True) - length).clamp(min=0)
    rows = first + torch.arange(length, device=first.device)  # [F, T]
    words = question.embeds.gather(1, rows[..., None].expand(-1, -1, question.embeds.shape[-1]))
    return words, question.valid.gather(1, rows)
