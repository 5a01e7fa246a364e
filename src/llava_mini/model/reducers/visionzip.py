"""VisionZip: the patches that the class token looks at most, and means of the others.

arXiv 2412.04467; needs no training. In the last layer of the vision tower that is run, the class token's attention is
summed over the heads.

- Dominant: the class token itself, and the patches with the largest sums, in the order of the grid.
- Contextual: of the remaining patches some, evenly spaced. Each of the others is given to the spaced one whose key,
  the mean over the heads, is closest in cosine, and the mean of what it was given is added to each.

The paper divides 64, 128 and 192 tokens as 54 + 10, 108 + 20 and 162 + 30: 27 to 5. Other numbers are divided alike,
with contextual tokens rounded down. The crops of an HD frame have a class token each; their mean stands for them.

Shapes: F frames, N patches, E vision width, C width of a head, Q tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModel

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.class_attention import class_attention, class_attention_work
from llava_mini.model.reducers.base import Cost, Reduced, Reducer, TowerRead, take_rows


def num_contextual(num_tokens: int) -> int:
    """How many of so many tokens are contextual."""
    return num_tokens * 5 // 32


def read_last_run_layer(tower: CLIPVisionModel, hidden: tuple[Tensor, ...]) -> Tensor:
    """Mean keys, summed attention, and beside each patch the class token as the layer leaves it: [F, N, C + 1 + E]."""
    before, after = hidden
    num_heads = tower.config.num_attention_heads
    keys, attention = class_attention(tower.encoder.layers[-2], before, num_heads)
    mean_keys = keys.unflatten(2, (num_heads, -1)).mean(2)  # [F, N, C]
    # As large as the patches, and gone when the frames that pass together are reduced.
    class_token = after[:, :1].expand(-1, keys.shape[1], -1)
    return torch.cat([mean_keys, attention.sum(1)[..., None], class_token], dim=-1)


class VisionZip(Reducer):
    """Keep what dominates, and merge the rest by likeness into ``reducer_tokens`` in all."""

    reads = (TowerRead(layers=lambda count: (count - 2, count - 1), values=read_last_run_layer),)

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, N, E + C + 1 + E], each with its key, its attention, and the class token of its view."""
        vision, contextual = self.config.vision, num_contextual(self.config.reducer_tokens)
        num_dominant = self.config.reducer_tokens - contextual
        widths = (vision.hidden_size, vision.hidden_size // vision.num_attention_heads, 1, vision.hidden_size)
        values, keys, attention, class_token = patches.split(widths, dim=-1)
        order = attention[..., 0].argsort(dim=1, descending=True, stable=True)  # [F, N]
        dominant, remaining = (
            part.sort(dim=1).values for part in order.tensor_split([num_dominant - 1], dim=1)
        )  # [F, dominant - 1], [F, R]
        tokens = [class_token.mean(1, keepdim=True), take_rows(values, dominant)]
        if contextual:
            tokens.append(_merge(take_rows(values, remaining), take_rows(keys, remaining), contextual))
        return Reduced(torch.cat(tokens, dim=1))  # [F, Q, E]

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """Of each remaining patch its likeness to the spaced ones, and what is given to these."""
        vision, contextual = config.vision, num_contextual(config.reducer_tokens)
        others = config.reduced_patches - (config.reducer_tokens - 1)  # neither dominant nor spaced
        widths = vision.hidden_size + vision.hidden_size // vision.num_attention_heads
        return Cost(of_tower=class_attention_work(config), per_frame=2 * others * contextual * widths)


def _merge(values: Tensor, keys: Tensor, contextual: int) -> Tensor:
    """Contextual tokens [F, contextual, E] of the remaining patches [F, R, E] and their keys [F, R, C]."""
    places = torch.arange(values.shape[1], device=values.device)
    step = values.shape[1] // contextual
    is_centre = (places % step == 0) & (places < step * contextual)  # [R]
    unit = functional.normalize(keys.float(), dim=-1)
    closest = (unit[:, ~is_centre] @ unit[:, is_centre].transpose(1, 2)).argmax(2)  # [F, others]
    given = functional.one_hot(closest, contextual).transpose(1, 2)  # [F, contextual, others]
    sums = given.to(values.dtype) @ values[:, ~is_centre]  # [F, contextual, E]
    return values[:, is_centre] + sums / given.sum(2, keepdim=True).clamp(min=1)
