"""The released layout of LLaVA-Mini: what the authors call each tensor.

One table serves both uses: ``from_pretrained`` applies it while loading (it is registered with
transformers on ``import llava_mini``), the converter applies it to write our layout. LLaVA-1.5 as
published by its authors has the same names, without reducer and pre-fusion.
"""

import re
from collections.abc import Iterable

from transformers.core_model_loading import WeightConverter, WeightRenaming

Renamings = tuple[tuple[str, str], ...]
"""Patterns of leading parts of a name, and what stands for them in our layout."""

RELEASED: Renamings = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "projector.linear_2."),
    (r"^model\.compressor\.query", "reducer.queries"),
    (r"^model\.compressor\.pos_embed", "reducer.query_codes"),
    (r"^model\.compressor\.ln_q\.", "reducer.query_norm."),
    (r"^model\.compressor\.ln_kv\.", "reducer.patch_norm."),
    (r"^model\.compressor\.attn\.", "reducer.attend."),
    (r"^model\.prefusion_layers\.(\d+)\.", r"prefusion.layers.\1.block."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
"""Names of the authors and ours. Our names start with none of theirs and pass unchanged."""

LEGACY_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Constants that old checkpoints store and transformers computes."""


def conversion_mapping() -> list[WeightConverter | WeightRenaming]:
    """The released names in the form that transformers applies while loading."""
    return [WeightRenaming(released, ours) for released, ours in RELEASED]


def rename(name: str, renamings: Iterable[tuple[str, str]] = RELEASED) -> str:
    """Our name of a tensor: the first pattern that fits is applied."""
    for pattern, ours in renamings:
        renamed, changes = re.subn(pattern, ours, name, count=1)
        if changes:
            return renamed
    return name
