"""The released layout of LLaVA-Mini: what the authors call each tensor.

One table serves both uses: ``from_pretrained`` applies it while loading (it is registered with
transformers on ``import llava_mini``), the converter applies it to write our layout.
"""

from transformers.core_model_loading import WeightRenaming

# Patterns match whole leading parts of a name, so our own names, which start with none of them, pass unchanged.
RENAMINGS: tuple[tuple[str, str], ...] = (
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
"""Names of the authors and ours."""


def renamings() -> list[WeightRenaming]:
    """The table in the form in which transformers applies it."""
    return [WeightRenaming(released, ours) for released, ours in RENAMINGS]
