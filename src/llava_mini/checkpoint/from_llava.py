"""LLaVA-1.5, in the layout of its authors and in that of transformers, as a model with (identity, 0).

Such a model can be the start of a new LLaVA-Mini: pre-fusion begins as a copy of the language
model's first layers, the reducer as in any new model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_mini.checkpoint.from_original import Renamings
from llava_mini.config import LlavaMiniConfig, translate_released
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

TRANSFORMERS_LLAVA: Renamings = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^(?:model\.)?multi_modal_projector\.", "projector."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
)
"""Names of transformers, of all its versions, where they are not our own."""


def translate_llava(original: Mapping[str, Any], folder: Path | None) -> LlavaMiniConfig:
    """Our configuration for one published by LLaVA's authors.

    Args:
        original: their dictionary.
        folder: the model's folder, where the vision tower may be described.

    Raises:
        ValueError: it is not LLaVA-1.5: the tower is unknown, or a field has another value.
    """
    _expect(original, "mm_patch_merge_type", "flat")
    ours = translate_released(original, folder)
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling", "dtype", "torch_dtype"}
    return LlavaMiniConfig(
        vision_config=ours["vision_config"],
        text_config={key: value for key, value in ours["text_config"].items() if key in known},
        reducer="identity",
        prefusion_num_layers=0,
    )


def translate_transformers_llava(theirs: Mapping[str, Any]) -> LlavaMiniConfig:
    """Our configuration for transformers' ``LlavaConfig``.

    Raises:
        ValueError: it is not LLaVA-1.5: a field has another value.
    """
    for field, expected in (
        ("vision_feature_layer", -2),
        ("vision_feature_select_strategy", "default"),
        ("projector_hidden_act", "gelu"),
        ("multimodal_projector_bias", True),
    ):
        _expect(theirs, field, expected)
    config = LlavaConfig(**theirs)
    vision, text = config.vision_config, config.text_config
    if not isinstance(vision, CLIPVisionConfig) or text is None:
        raise ValueError(
            f"The vision tower is of type {getattr(vision, 'model_type', None)!r}, but LLaVA-1.5 has "
            "'clip_vision_model'. Only LLaVA-1.5 can be converted."
        )
    return LlavaMiniConfig(vision_config=vision, text_config=text, reducer="identity", prefusion_num_layers=0)


def start_llava_mini(
    tensors: dict[str, Tensor],
    config: LlavaMiniConfig,
    *,
    reducer: str,
    reducer_grid: int,
    prefusion_num_layers: int,
    reducer_tokens: int | None = None,
    resolution_ratio: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], LlavaMiniConfig]:
    """Tensors and configuration of a new LLaVA-Mini that starts from LLaVA-1.5.

    Args:
        tensors: of a model with (identity, 0), in our layout.
        config: of this model.
        reducer: name of the reducer of the new model.
        reducer_grid: tokens per side of a frame.
        prefusion_num_layers: how many of the language model's first layers to copy.
        reducer_tokens: tokens of a frame, where they form no grid. None: as in any new model.
        resolution_ratio: crops per side. None: as in the model.
        seed: of the reducer's weights, and of a projector of its own.

    Raises:
        ValueError: the model has a reducer or pre-fusion already, or fewer layers than are to be copied; or this
            reducer cannot do what is asked of it.
    """
    if config.reducer != "identity" or config.prefusion_num_layers:
        raise ValueError(
            f"A new LLaVA-Mini starts from LLaVA-1.5, but this model has the reducer {config.reducer!r} and "
            f"{config.prefusion_num_layers} pre-fusion layers already. Leave out reducer and prefusion_num_layers."
        )
    if prefusion_num_layers > config.text.num_hidden_layers:
        raise ValueError(
            f"Pre-fusion copies the first {prefusion_num_layers} layers of a language model that has "
            f"{config.text.num_hidden_layers}. Give a smaller prefusion_num_layers."
        )
    new = LlavaMiniConfig(
        vision_config=config.vision,
        text_config=config.text,
        reducer=reducer,
        reducer_grid=reducer_grid,
        prefusion_num_layers=prefusion_num_layers,
        resolution_ratio=config.resolution_ratio if resolution_ratio is None else resolution_ratio,
        reducer_tokens=LlavaMiniConfig.reducer_tokens if reducer_tokens is None else reducer_tokens,
    )
    dtype = next((one.dtype for name, one in tensors.items() if name.startswith("projector.")), torch.float32)
    added = {name: tensor.to(dtype) for name, tensor in _fresh_parts(new, seed).items()}
    if any(name.startswith("projector.") for name in added):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("projector.")}
    for name, tensor in tensors.items():
        place, _, inner = name.removeprefix("language_model.model.layers.").partition(".")
        if name.startswith("language_model.model.layers.") and int(place) < prefusion_num_layers:
            added[f"prefusion.layers.{place}.block.{inner}"] = tensor
    return {**tensors, **added}, new


def _fresh_parts(config: LlavaMiniConfig, seed: int) -> dict[str, Tensor]:
    """Initial tensors of the reducer, and of the projector if it is not LLaVA's. The rest of the model is not made."""
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(config)
    parts: dict[str, nn.Module] = {"reducer": model.reducer}
    if model.reducer.has_linear_projector:
        parts["projector"] = model.projector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in parts.values():
            part.to_empty(device="cpu").apply(model._init_weights)
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def _expect(config: Mapping[str, Any], field: str, expected: Any) -> None:
    if config.get(field, expected) != expected:
        raise ValueError(
            f"The configuration of LLaVA has {field}={config[field]!r}, but LLaVA-1.5 has {expected!r}. Only "
            "LLaVA-1.5 can be converted."
        )
