"""Modality pre-fusion: the text reads all patches in a few decoder layers (section 4.2).

The rows stand in the order [patches | reduced | text] under a causal mask, so the vision rows never
see the text. That makes two passes exact: the vision rows run once and leave their keys and values,
and the text rows run against them, for any number of questions. Text rows are packed to the left:
what stands right of a row is never seen, so padding needs no mask.

Shapes: F frames, P patches, Q reduced tokens, T text tokens, D language width, H key heads, C head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from llava_mini.flow import KeysValues

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of some positions, each [1, rows, C]."""


@dataclass(frozen=True)
class Family:
    """What a family of language models calls its parts."""

    block: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    rotate: Callable[..., tuple[Tensor, Tensor]]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        modeling_llama.LlamaDecoderLayer, modeling_llama.LlamaRotaryEmbedding, modeling_llama.apply_rotary_pos_emb
    ),
    "mistral": Family(
        modeling_mistral.MistralDecoderLayer,
        modeling_mistral.MistralRotaryEmbedding,
        modeling_mistral.apply_rotary_pos_emb,
    ),
    "qwen2": Family(
        modeling_qwen2.Qwen2DecoderLayer, modeling_qwen2.Qwen2RotaryEmbedding, modeling_qwen2.apply_rotary_pos_emb
    ),
    "qwen3": Family(
        modeling_qwen3.Qwen3DecoderLayer, modeling_qwen3.Qwen3RotaryEmbedding, modeling_qwen3.apply_rotary_pos_emb
    ),
}
"""Families of language models that pre-fusion can copy, by ``model_type``."""


_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotations that are not the same at every length."""


@dataclass(frozen=True)
class Fused:
    """What pre-fusion returns."""

    vision: Tensor | None
    """[F, num_outputs, D]: the last rows of the vision side, after the last layer. None: none were asked for."""
    text: Tensor | None
    """[F, T, D]. None: no text was given."""
    keys_values: tuple[KeysValues, ...]
    """Of the vision rows, for each layer: what later questions need."""


class Prefusion(nn.Module):
    """``num_layers`` decoder layers with the structure of the language model and their own weights.

    Args:
        config: the language model's configuration, shared with it.
        num_layers: how many layers.
    """

    def __init__(self, config: PreTrainedConfig, num_layers: int) -> None:
        super().__init__()
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"Pre-fusion knows the language models {', '.join(FAMILIES)}, not {config.model_type!r}. "
                "Use one of these, or prefusion_num_layers=0."
            )
        rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope_type in _LENGTH_DEPENDENT:
            raise ValueError(
                f"Pre-fusion cannot rotate with rope_type {rope_type!r}: its codes change with the length of the "
                "prompt, so vision would depend on the question. Use 'default', 'linear', 'yarn' or 'llama3'."
            )
        family = FAMILIES[config.model_type]
        self.config = config
        self.layers = nn.ModuleList(PrefusionLayer(config, family, index) for index in range(num_layers))
        self.rotary = family.rotary(config=config)

    def forward(
        self,
        vision: Tensor | tuple[KeysValues, ...],
        text: Tensor | None = None,
        *,
        num_outputs: int = 0,
        num_texts: int = 1,
    ) -> Fused:
        """Run the vision rows, unless their keys and values are at hand, and the text rows against them.

        Args:
            vision: patches and reduced tokens, [F, P + Q, D], or what an earlier call left.
            text: packed to the left, [F, T, D].
            num_outputs: how many of the last vision rows to return.
            num_texts: how many texts of equal length stand in ``text``, one after another. They do not see one another.
        """
        if num_texts > 1 and str(self.config._attn_implementation).startswith("flash_attention"):
            return self._one_by_one(vision, text, num_outputs, num_texts)
        stored = None if isinstance(vision, Tensor) else vision
        rows = vision if isinstance(vision, Tensor) else None
        num_vision = rows.shape[1] if rows is not None else vision[0][0].shape[2]
        num_text = 0 if text is None else text.shape[1]
        like = rows if rows is not None else text
        assert like is not None, "Pre-fusion was given neither vision rows nor text."
        of_vision, of_text = (torch.arange(rows, device=like.device) for rows in (num_vision, num_text // num_texts))
        positions = torch.cat([of_vision, num_vision + of_text.repeat(num_texts)])[None]
        cos, sin = self.rotary(like, positions)  # [1, P + Q + T, C]

        keys_values: list[KeysValues] = []
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            rows, text, left = layer(
                rows,
                text,
                stored[index] if stored is not None else None,
                (cos, sin),
                num_outputs if is_last else num_vision,
                num_texts,
            )
            keys_values.append(left)
        return Fused(rows if num_outputs else None, text, tuple(keys_values))

    def _one_by_one(
        self, vision: Tensor | tuple[KeysValues, ...], text: Tensor | None, num_outputs: int, num_texts: int
    ) -> Fused:
        """As ``forward``, for kernels that know no mask between texts."""
        assert text is not None
        first, *others = text.chunk(num_texts, dim=1)
        fused = self(vision, first, num_outputs=num_outputs)
        texts = [fused.text, *(self(fused.keys_values, other).text for other in others)]
        return Fused(fused.vision, torch.cat(texts, dim=1), fused.keys_values)

    def copy_from(self, layers: nn.ModuleList) -> None:
        """Start from the first decoder layers of a language model, which the paper leaves open."""
        for ours, theirs in zip(self.layers, layers, strict=False):
            cast(PrefusionLayer, ours).block.load_state_dict(theirs.state_dict())


class PrefusionLayer(nn.Module):
    """One decoder layer of the family, run over vision rows and text rows in one call.

    It owns its activation checkpointing: transformers' own would drop the keys and values.
    """

    block: modeling_llama.LlamaDecoderLayer
    """Of any of the families, which name their parts alike."""

    def __init__(self, config: PreTrainedConfig, family: Family, index: int) -> None:
        super().__init__()
        self.config = config
        self.block = cast(modeling_llama.LlamaDecoderLayer, family.block(config, index))
        self.rotate = family.rotate
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint

    def forward(
        self,
        vision: Tensor | None,
        text: Tensor | None,
        stored: KeysValues | None,
        rotation: Rotation,
        num_outputs: int,
        num_texts: int,
    ) -> tuple[Tensor | None, Tensor | None, KeysValues]:
        """Both passes.

        Args:
            vision: [F, P + Q, D], or None when ``stored`` holds its keys and values.
            text: [F, T, D] or None.
            stored: keys and values of the vision rows from an earlier call.
            rotation: for all positions, vision first.
            num_outputs: compute only this many of the last vision rows; the others leave keys and values.
            num_texts: how many texts of equal length ``text`` holds.
        """
        arguments = (vision, text, stored, rotation, num_outputs, num_texts)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._run, *arguments)
        return self._run(*arguments)

    def _run(
        self,
        vision: Tensor | None,
        text: Tensor | None,
        stored: KeysValues | None,
        rotation: Rotation,
        num_outputs: int,
        num_texts: int,
    ) -> tuple[Tensor | None, Tensor | None, KeysValues]:
        if vision is not None:
            num_silent = vision.shape[1] - num_outputs
            silent, vision = vision[:, :num_silent], vision[:, num_silent:]
            stored = self._keys_values(silent, rotation) if num_silent else None
            if num_outputs:
                vision, stored = self._rows(vision, stored, rotation)
        assert stored is not None
        if text is not None:
            text, _ = self._rows(text, stored, rotation, num_texts)
        return vision, text, stored

    def _rows(
        self, hidden: Tensor, before: KeysValues | None, rotation: Rotation, num_texts: int = 1
    ) -> tuple[Tensor, KeysValues]:
        """Run rows [F, rows, D] against the keys and values before them and their own."""
        start = before[0].shape[2] if before is not None else 0
        end = start + hidden.shape[1]
        store = _Store(before)
        attention = self.block.self_attn
        attended, _ = attention(
            hidden_states=self.block.input_layernorm(hidden),
            position_embeddings=(rotation[0][:, start:end], rotation[1][:, start:end]),
            attention_mask=self._mask(hidden, start, num_texts),
            past_key_values=cast(Cache, store),
        )
        hidden = hidden + attended
        hidden = hidden + self.block.mlp(self.block.post_attention_layernorm(hidden))
        return hidden, store.keys_values  # [F, rows, D]

    def _keys_values(self, hidden: Tensor, rotation: Rotation) -> KeysValues:
        """Keys and values of the first rows [F, rows, D], and nothing else."""
        attention = self.block.self_attn
        hidden = self.block.input_layernorm(hidden)
        at_rows = (rotation[0][:, : hidden.shape[1]], rotation[1][:, : hidden.shape[1]])
        key = rotated_heads(attention, "k", hidden, at_rows, self.rotate)  # [F, H, rows, C]
        value = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [F, H, rows, C]
        return key, value

    def _mask(self, hidden: Tensor, num_before: int, num_texts: int) -> Tensor | None:
        """Causal mask [1, 1, rows, num_before + rows], or None where the kernel does it by itself."""
        kernel, num_rows = str(self.config._attn_implementation), hidden.shape[1]
        if kernel.startswith("flash_attention"):
            return None  # aligned to the last key, and windowed by its own argument
        attention = self.block.self_attn
        window = getattr(attention, "sliding_window", None)
        if self.config.model_type == "mistral":
            window = self.config.sliding_window
        masks = ALL_MASK_ATTENTION_FUNCTIONS.get(kernel)  # a kernel that somebody registered comes with one of these
        if masks is sdpa_mask and window is None and num_before == 0 and num_texts == 1:
            return None
        before, rows = (torch.arange(number, device=hidden.device) for number in (num_before, num_rows))
        length = num_rows // num_texts
        text = torch.cat([torch.full_like(before, -1), rows // length])  # of each column; -1 is seen by every text
        position = torch.cat([before, num_before + rows % length])
        row, column = position[num_before:, None], position[None, :]
        visible = (column <= row) & ((text < 0) | (text == (rows // length)[:, None]))
        if window is not None:
            visible &= column > row - window
        if masks is sdpa_mask:
            return visible[None, None]
        if masks is eager_mask:
            hidden_value = torch.finfo(hidden.dtype).min
            return torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, hidden_value)[None, None]
        raise ValueError(
            f"Pre-fusion runs with the attention kernels eager, sdpa, flash_attention and their like, not {kernel!r}. "
            "Load the model with attn_implementation='sdpa'."
        )


def rotated_heads(
    attention: Any, part: Literal["q", "k"], hidden: Tensor, rotation: Rotation, rotate: Callable[..., Any]
) -> Tensor:
    """Queries or keys that an attention module of a family makes of normed rows [F, rows, D]: [F, heads, rows, C]."""
    norm = getattr(attention, f"{part}_norm", nn.Identity())  # query and key norms: Qwen3
    made = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    made = norm(made).transpose(1, 2)
    return rotate(made, made, *rotation)[0]


class _Store:
    """The part of a transformers cache that an attention module calls, for one layer and one pass."""

    def __init__(self, before: KeysValues | None) -> None:
        self.before = before

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> KeysValues:
        if self.before is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.before, (key, value), strict=True))
        self.keys_values = (key, value)
        return self.keys_values
