"""Which patches the class token looks at in one layer of the vision tower, and the keys that it finds there.

Methods that keep some patches of a frame and drop others rank them by this attention. No more of the layer is run than
that takes: its first norm, the key map of all rows, and the query map of the class token's row.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava_mini.config import LlavaMiniConfig


def class_attention(layer: nn.Module, hidden: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Attention of the class token to the patches of each picture.

    Args:
        layer: of the vision tower.
        hidden: [F, 1 + N, E], what enters the layer, class token first.
        num_heads: the layer's own number, or 1 to take its whole width as one head.

    Returns:
        Keys of the patches, biases included, [F, N, E], and attention [F, heads, N]. The class token also attends to
        itself: what is left for the patches sums to less than 1.
    """
    assert isinstance(layer, CLIPEncoderLayer)
    with _put_together(layer):
        rows = layer.layer_norm1(hidden)  # [F, 1 + N, E]
        keys = layer.self_attn.k_proj(rows)
        query = layer.self_attn.q_proj(rows[:, 0])  # [F, E]
    queries = query.unflatten(1, (num_heads, 1, -1))  # [F, heads, 1, C]
    by_head = keys.unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1)  # [F, heads, C, 1 + N]
    scores = (queries @ by_head)[:, :, 0] * queries.shape[-1] ** -0.5  # [F, heads, 1 + N]
    attention = scores.float().softmax(-1)[..., 1:]  # [F, heads, N]
    return keys[:, 1:], attention.to(hidden.dtype)


def class_attention_work(config: LlavaMiniConfig) -> int:
    """Operations of ``class_attention`` for one view, with any number of heads."""
    width, rows = config.vision.hidden_size, config.patches_per_side**2 + 1
    return 2 * width**2 * (rows + 1) + 2 * width * rows


@contextmanager
def _put_together(layer: nn.Module) -> Iterator[None]:
    """Weights of a layer outside of its ``forward``, which is where ``fully_shard`` would put them together."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()
