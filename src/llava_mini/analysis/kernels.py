"""Attention kernels that tell what they see, or that hide keys, put into a language model for a while.

They enter by transformers' registry of attention functions, so a model is not changed, and any model whose layers
take their attention from there will do. Nothing of the size rows x keys is held for longer than a chunk of rows.

Shapes: B prompts or frames, H heads, R query rows, K keys, C head width, S tokens of a prompt.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Kernel = Callable[..., tuple[Tensor, None]]
"""A function of transformers' ``AttentionInterface``, with the masks of ``sdpa``: True where a key is seen."""

Listener = Callable[[int, Tensor], None]
"""Told the position of the first of some rows among the keys, and their weights [B, rows, K], the mean over heads."""

MOST_WEIGHTS = 1 << 24
"""Weights in memory at a time, over all heads: 64 MB in float32."""

NAME = "llava_mini_analysis"
"""What the registry calls a kernel while it is in use."""


@contextmanager
def kernel_in(model: PreTrainedModel, kernel: Kernel) -> Iterator[None]:
    """Let a model, and whatever shares its configuration, attend by a kernel until the end of the block.

    Args:
        model: Of transformers, without parts that have a configuration of their own.
        kernel: From ``watching`` or ``hiding``.

    Raises:
        ValueError: The model does not take its attention from transformers' registry.
    """
    before = str(model.config._attn_implementation)
    ALL_ATTENTION_FUNCTIONS[NAME], ALL_MASK_ATTENTION_FUNCTIONS[NAME] = kernel, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"The attention of a {type(model).__name__} cannot be watched: it does not use the attention functions "
                "of transformers. Use a language model like Llama, Vicuna, Mistral or Qwen."
            )
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME], ALL_MASK_ATTENTION_FUNCTIONS[NAME]


def watching(watched: Mapping[nn.Module, Listener], most_weights: int = MOST_WEIGHTS) -> Kernel:
    """Return a kernel that tells the weights of some attention modules; all others run as always.

    Args:
        watched: Who is told the weights of which module.
        most_weights: So many are in memory at a time, or one row of all heads if that is more.
    """

    def kernel(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        listener = watched.get(module)
        if listener is None:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        return _attend(query, key, value, attention_mask, listener, most_weights), None

    return kernel


def hiding(modules: Collection[nn.Module], hidden: Tensor, most_pairs: int = MOST_WEIGHTS) -> Kernel:
    """Return a kernel that hides some keys, in some attention modules, from all rows but the hidden ones themselves.

    Args:
        modules: Where they are hidden.
        hidden: [S] bool: positions of a prompt. Tokens that follow the prompt are never hidden.
        most_pairs: So many pairs of a row and a key have a mask in memory at a time, or one row if that is more.
    """

    def kernel(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if module not in modules:
            return attend(module, query, key, value, attention_mask, **kwargs)
        num_keys, before = key.shape[2], key.shape[2] - query.shape[2]
        is_hidden = functional.pad(hidden[:num_keys], (0, max(num_keys - len(hidden), 0)))  # [K]
        attended, position, step = [], before, max(most_pairs // num_keys, 1)
        for rows in query.split(step, dim=2):
            end = position + rows.shape[2]
            part = None if attention_mask is None else attention_mask[:, :, position - before : end - before]
            visible = _visible(part, position, rows.shape[2], num_keys, query.device)
            visible = visible & ~(is_hidden & ~is_hidden[position:end, None])  # [B, 1, rows, K]
            attended.append(attend(module, rows, key, value, visible, **kwargs)[0])  # [B, rows, H, C]
            position = end
        return torch.cat(attended, dim=1), None

    return kernel


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, listener: Listener, most_weights: int
) -> Tensor:
    """Attention of scaled queries [B, H, R, C], some rows at a time: [B, R, H, C]."""
    (num_prompts, num_heads, num_rows, _), num_keys = query.shape, key.shape[2]
    copies = num_heads // key.shape[1]
    key, value = (part.repeat_interleave(copies, dim=1) for part in (key, value))  # [B, H, K, C]
    step = max(most_weights // (num_prompts * num_heads * num_keys), 1)
    attended = []
    for start in range(0, num_rows, step):
        rows = query[:, :, start : start + step]
        part = mask[:, :, start : start + step, :num_keys] if mask is not None else None
        position = num_keys - num_rows + start
        visible = _visible(part, position, rows.shape[2], num_keys, query.device)
        scores = (rows @ key.transpose(2, 3)).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32)  # [B, H, rows, K]
        listener(position, weights.mean(1))
        attended.append(weights.to(value.dtype) @ value)
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _visible(mask: Tensor | None, position: int, num_rows: int, num_keys: int, device: torch.device) -> Tensor:
    """Which keys some rows see, [B or 1, 1, rows, K] bool; without a mask, those up to their own."""
    if mask is not None:
        return mask
    row = torch.arange(position, position + num_rows, device=device)
    return (torch.arange(num_keys, device=device) <= row[:, None])[None, None]
