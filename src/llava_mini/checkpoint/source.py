"""Whatever a folder holds, as a model in our layout that stays on disk.

The layout is recognised by files and by ``model_type``, from one table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig

from llava_mini.checkpoint.adapters import Adapter, LowRank, is_adapter, read_adapter
from llava_mini.checkpoint.from_llava import TRANSFORMERS_LLAVA, translate_llava, translate_transformers_llava
from llava_mini.checkpoint.from_original import LEGACY_BUFFERS, RELEASED, rename
from llava_mini.checkpoint.from_peers import MQT, TOKEN_PACKER, TRANSLATIONS, peer_layout, turn_projector
from llava_mini.checkpoint.locate import locate
from llava_mini.checkpoint.tensors import read_folder, read_json
from llava_mini.config import LlavaMiniConfig, find_vision_tower, translate_released
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.pretrained import describe_misfit

Layout = Literal["ours", "released", "llava", "transformers_llava", "mqt", "token_packer", "language_model"]

LAYOUTS: dict[str, Layout] = {
    "llava_mini": "ours",
    "llava_mini_llama": "released",
    "llava": "llava",
    "llava_llama": "llava",
    "llama": "language_model",
    "mistral": "language_model",
    "qwen2": "language_model",
    "qwen3": "language_model",
}
"""What a ``model_type`` means; "llava" with a ``text_config`` is transformers' layout, and others have fields of their
own."""

EXPORTED_PARTS = ("language_model", "front_end")
"""Folders that ``export`` makes."""

RENAMINGS = RELEASED + TRANSFORMERS_LLAVA + MQT + TOKEN_PACKER


@dataclass
class Source:
    """A model on disk."""

    folder: Path | None
    """Where its tokenizer is. None: the model is in memory."""
    layout: Layout
    published: Mapping[str, Any]
    """The configuration as it was found."""
    config: LlavaMiniConfig
    tensors: dict[str, Tensor]
    """Under our names, mapped, in the order of their files."""
    updates: dict[str, LowRank] = field(default_factory=dict)
    generation: GenerationConfig | None = None
    """Generation settings of a model in memory."""

    def finish(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is written: with the update that an adapter has for it."""
        return self.updates[name].add_to(tensor) if name in self.updates else tensor.cpu()


def read_source(folder: Path, *, base: str | Path | None = None, vision_tower: str | Path | None = None) -> Source:
    """Read a model in any known layout.

    Args:
        folder: the model, or an adapter.
        base: the model that an adapter belongs to. None: the one that PEFT's configuration names.
        vision_tower: the folder of a CLIP model. None: the tensors of the model, or what its configuration names.

    Raises:
        ValueError: the layout is unknown, a base was given to a whole model, or tensors are missing, unexpected or
            misshapen.
    """
    if base is not None and not is_adapter(folder):
        raise ValueError(f"The base {str(base)!r} was given, but {str(folder)!r} is a whole model. Leave the base out.")
    if all((folder / part / "config.json").exists() for part in EXPORTED_PARTS):
        source = _join_exported(folder)
    else:
        adapter = read_adapter(folder, RENAMINGS) if is_adapter(folder) else None
        base_folder = folder if adapter is None else _base_folder(folder, base, adapter)
        own_config = adapter is None or (folder / "config.json").exists()
        published = read_json(folder / "config.json" if own_config else base_folder / "config.json")
        if vision_tower is not None:
            published["mm_vision_tower"] = str(Path(vision_tower).absolute())
        try:
            config, layout = _configure(published, folder if own_config else base_folder)
        except StrictDataclassError as error:
            raise ValueError(
                f"The config.json of {str(folder)!r} is not valid: {' '.join(str(error).split())}"
            ) from error
        tensors = {
            rename(name, RENAMINGS): value
            for name, value in read_folder(base_folder).items()
            if not LEGACY_BUFFERS.search(name)
        }
        source = Source(base_folder, layout, published, config, tensors)
        if adapter is not None:
            _apply(adapter, source, folder)
        if layout == "mqt":
            turn_projector(source.tensors)
    _complete(source, folder, given_tower=vision_tower is not None)
    return source


def expected_tensors(config: LlavaMiniConfig) -> dict[str, Tensor]:
    """Names, shapes and dtypes that a checkpoint of this configuration has; on the meta device."""
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(config)
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def check_complete(tensors: Mapping[str, Tensor], config: LlavaMiniConfig, folder: Path) -> None:
    """Compare with what the configuration says.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message lists them.
    """
    expected = expected_tensors(config)
    misshapen = [
        (name, tuple(tensors[name].shape), tuple(wanted.shape))
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted.shape
    ]
    misfit = describe_misfit(expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), misshapen)
    if misfit:
        raise ValueError(f"The checkpoint {str(folder)!r} does not fit its configuration: {misfit}")


def _configure(published: Mapping[str, Any], folder: Path) -> tuple[LlavaMiniConfig, Layout]:
    model_type = published.get("model_type", "")
    if model_type not in LAYOUTS:
        raise ValueError(
            f"{str(folder)!r} holds a model of the type {model_type!r}, which convert does not know. It knows "
            f"{', '.join(LAYOUTS)}."
        )
    layout = LAYOUTS[model_type]
    if layout == "llava":
        layout = "transformers_llava" if "text_config" in published else cast(Layout, peer_layout(published))
    match layout:
        case "ours":
            return LlavaMiniConfig.from_dict(published), layout
        case "released":
            return LlavaMiniConfig.from_dict(translate_released(published, folder)), layout
        case "llava":
            return translate_llava(published, folder), layout
        case "transformers_llava":
            return translate_transformers_llava(published), layout
        case "mqt" | "token_packer":
            return TRANSLATIONS[layout](published, folder), layout
        case "language_model":
            raise ValueError(
                f"{str(folder)!r} holds a plain language model ({model_type}), not a LLaVA. Give it as the base of an "
                "adapter's folder that has a config.json."
            )


def _base_folder(folder: Path, base: str | Path | None, adapter: Adapter) -> Path:
    name = str(base) if base is not None else adapter.base
    if not name:
        raise ValueError(
            f"{str(folder)!r} holds an adapter and no model. Give the folder of the model it was trained on as base."
        )
    return locate(name)


def _apply(adapter: Adapter, source: Source, folder: Path) -> None:
    """Lay an adapter over its base."""
    source.tensors |= {name: value for name, value in adapter.replaced.items() if not LEGACY_BUFFERS.search(name)}
    if strange := sorted(adapter.updates.keys() - source.tensors.keys()):
        raise ValueError(
            f"The adapter {str(folder)!r} updates {len(strange)} tensors that its base {str(source.folder)!r} does not "
            f"have ({', '.join(strange[:10])}). Is this the model that it was trained on?"
        )
    source.updates = adapter.updates


def _join_exported(folder: Path) -> Source:
    """The two folders that ``export`` made, as one model."""
    language_folder, front_folder = (folder / part for part in EXPORTED_PARTS)
    tensors = {f"language_model.{name}": value for name, value in read_folder(language_folder).items()}
    published = read_json(front_folder / "config.json")
    return Source(
        front_folder,
        "ours",
        published,
        LlavaMiniConfig.from_dict(published),
        {**read_folder(front_folder), **tensors},
    )


def _complete(source: Source, folder: Path, *, given_tower: bool) -> None:
    """Drop the copies of tied tensors, read the vision tower from where it is named, and check everything."""
    expected = expected_tensors(source.config)
    if source.config.tie_word_embeddings:
        source.tensors.pop("language_model.lm_head.weight", None)
    tower = [name for name in expected if name.startswith("vision_tower.")]
    if given_tower or not any(name in source.tensors for name in tower):
        name = source.published.get("mm_vision_tower", "")
        found = next((path for place in (folder, source.folder) if (path := find_vision_tower(name, place))), None)
        if found is None or not found.is_dir():
            raise ValueError(
                f"The checkpoint {str(folder)!r} holds no vision tower, and {name!r}, which it names, is not a folder "
                "beside it. Download that CLIP model and give its folder as vision_tower."
            )
        stored = {
            f"vision_tower.{key.removeprefix('vision_model.')}": value for key, value in read_folder(found).items()
        }
        source.tensors |= {key: stored[key] for key in tower if key in stored}
    check_complete(source.tensors, source.config, folder)
