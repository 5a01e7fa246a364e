"""Other methods that were published on the skeleton of LLaVA-1.5: MQT-LLaVA and TokenPacker.

Their configurations are those of LLaVA-1.5 with a few fields of their own, and so are their tensors: what stands in the
place of LLaVA's projector has names of its own, of which none is used by another layout.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_mini.checkpoint.from_llava import translate_llava
from llava_mini.checkpoint.from_original import Renamings
from llava_mini.config import LlavaMiniConfig
from llava_mini.reducer_settings import matryoshka_side

MQT: Renamings = (
    (r"^model\.query_abstractor\.query$", "reducer.queries"),
    (r"^model\.query_abstractor\.pos_embed$", "reducer.query_codes"),
    (r"^model\.query_abstractor\.ln_q\.", "reducer.query_norm."),
    (r"^model\.query_abstractor\.ln_k\.", "reducer.key_norm."),
    (r"^model\.query_abstractor\.ln_v\.", "reducer.value_norm."),
    (r"^model\.query_abstractor\.attn\.", "reducer.attend."),
    (r"^model\.query_abstractor\.proj$", "projector.weight"),
)
TOKEN_PACKER: Renamings = (
    (r"^model\.mm_projector\.q_proj_1\.", "reducer.query_map."),
    (r"^model\.mm_projector\.ln_q_1\.", "reducer.query_norm."),
    (r"^model\.mm_projector\.k_proj_1\.", "reducer.regions.key_map."),
    (r"^model\.mm_projector\.ln_k_1\.", "reducer.regions.key_map.3."),
    (r"^model\.mm_projector\.v_proj_1\.", "reducer.regions.value_map."),
    (r"^model\.mm_projector\.ln_v_1\.", "reducer.regions.value_map.3."),
    (r"^model\.mm_projector\.clip_attn\.", "reducer.regions.attend."),
    (r"^model\.mm_projector\.mlp\.0\.", "projector.linear_1."),
    (r"^model\.mm_projector\.mlp\.2\.", "projector.linear_2."),
)


def translate_mqt(published: Mapping[str, Any], folder: Path | None) -> LlavaMiniConfig:
    """Our configuration for one of MQT-LLaVA. All queries are kept if it does not say how many.

    Args:
        published: their dictionary.
        folder: the model's folder, where the vision tower may be described.

    Raises:
        ValueError: the tower is unknown, or there are more tokens than queries.
    """
    skeleton = _skeleton(published, folder)
    told = str(published.get("num_visual_tokens"))  # in training the name of a stage
    num_tokens = int(told) if told.isdecimal() else matryoshka_side(skeleton) ** 2
    return _with(skeleton, reducer="mqt", reducer_tokens=num_tokens)


def translate_token_packer(published: Mapping[str, Any], folder: Path | None) -> LlavaMiniConfig:
    """Our configuration for one of TokenPacker.

    Args:
        published: their dictionary.
        folder: the model's folder, where the vision tower may be described.

    Raises:
        ValueError: the tower is unknown, it reads slices of high-resolution images, or the patches cannot be divided.
    """
    if published.get("image_aspect_ratio") == "slice":
        raise ValueError(
            "This TokenPacker cuts images into slices (image_aspect_ratio='slice'), which this project does not do. "
            "Only its models for one view of an image can be converted."
        )
    skeleton, factor = _skeleton(published, folder), published.get("scale_factor", 2)
    if type(factor) is not int or factor < 1 or skeleton.patches_per_side % factor:
        raise ValueError(
            f"TokenPacker's configuration has scale_factor={factor!r}, which does not divide its tower's "
            f"{skeleton.patches_per_side} patches per side. Is it the configuration of these weights?"
        )
    return _with(skeleton, reducer="token_packer", reducer_grid=skeleton.patches_per_side // factor)


def _skeleton(published: Mapping[str, Any], folder: Path | None) -> LlavaMiniConfig:
    """The LLaVA-1.5 that the method is built on; its type of projector is left unused."""
    return translate_llava({key: value for key, value in published.items() if key != "mm_projector_type"}, folder)


def _with(config: LlavaMiniConfig, **fields: Any) -> LlavaMiniConfig:
    return LlavaMiniConfig.from_dict({**config.to_dict(), **fields})


def turn_projector(tensors: dict[str, Tensor]) -> None:
    """Lay MQT's bare matrix, which stands on the right of a product, as linear layers store theirs."""
    if "projector.weight" in tensors:
        tensors["projector.weight"] = tensors["projector.weight"].T


TRANSLATIONS: dict[str, Callable[[Mapping[str, Any], Path | None], LlavaMiniConfig]] = {
    "mqt": translate_mqt,
    "token_packer": translate_token_packer,
}
"""By layout."""


def peer_layout(published: Mapping[str, Any]) -> str:
    """Which layout a configuration of LLaVA's family has by its own fields: one of ``TRANSLATIONS``, or "llava"."""
    if "query_abstractor_type" in published or "num_visual_tokens" in published:
        return "mqt"
    return "token_packer" if published.get("mm_projector_type") == "tokenpacker" else "llava"
