"""FastV (arXiv 2403.06764): all patches in the first layers of the language model, the most looked at in the others.

It needs no training: any LLaVA-1.5 runs with it by configuration alone. After ``reducer_layer`` layers (2 or 3 in the
source) the vision rows of a prompt are ranked by how much its last token looks at them in the layer before, averaged
over heads, and the first ``reducer_tokens`` for each frame stay, with their positions; in the source that is 288 or 144
of 576. Frames of one prompt are ranked together, so one may keep more than another. A prompt that ends with a frame
keeps its last row, which answers. The choice is made once, when the prompt is read. The method is one of inference:
while the model trains, nothing is dropped.

This is our own code after the paper: the published repository has no licence.
"""

import torch
from torch import Tensor

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.inside import Dropping, Inside, LayerInput, PromptRows, attention_of_row
from llava_mini.model.reducers.base import Cost, Reduced, Reducer


class FastV(Reducer):
    """Keep all patches at first, and inside the language model those that the question looks at."""

    keeps_patches = True
    acts_inside = drops_inside = True
    drops_in_training = False

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, P, E]."""
        return Reduced(patches)  # [F, P, E]

    def inside(self, rows: PromptRows) -> Inside:
        """Drop the rows that the last token hardly looks at; in training none."""
        return Inside() if self.training else _MostLookedAt(rows, self.config)

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """To rank takes the keys of all rows once more, and one query."""
        text = config.text
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys, queries = text.num_key_value_heads * head_width, text.num_attention_heads * head_width
        return Cost(
            later_tokens=config.reducer_tokens,
            per_row=2 * text.hidden_size * keys + 2 * queries,
            per_prompt=2 * text.hidden_size * queries,
        )


class _MostLookedAt(Dropping):
    """Keeps text, and of each prompt's frames the rows that its last token looks at most."""

    def __init__(self, rows: PromptRows, config: LlavaMiniConfig) -> None:
        super().__init__(rows, config.reducer_layer)
        self._config = config
        self._attention: Tensor  # [B, R], from the last layer that gets all rows

    @torch.no_grad()
    def look(self, given: LayerInput) -> None:
        """Note what the last token looks at."""
        copies = given.hidden.shape[0] // len(self.rows.last)
        last = self.rows.last.repeat_interleave(copies).to(given.hidden.device)
        looked = attention_of_row(given, last, self._config.text.model_type)
        self._attention = looked.scatter(1, last[:, None], torch.inf)

    def keep(self, given: LayerInput) -> Tensor:
        """[B, R] bool."""
        is_image = self.rows.fitted(self.rows.is_image, given.hidden, given.hidden.shape[1])
        number = is_image.sum(1, keepdim=True) // self.rows.tokens_per_frame * self._config.reducer_tokens  # [B, 1]
        order = self._attention.masked_fill(~is_image, -1).argsort(dim=1, descending=True, stable=True)
        return ~is_image | (order.argsort(1) < number)
