"""The model that a training starts from: parts put together, or one that goes on.

A stage-1 model is a language model, a CLIP tower, and a fresh projector. A stage-2 model is any model whose reducer and
pre-fusion are there already, or are added to one that has neither. What was loaded is never drawn anew.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llava_mini.checkpoint.companions import GENERATION_CONFIG, PROCESSOR_CONFIG, generation_config
from llava_mini.checkpoint.from_llava import start_llava_mini
from llava_mini.checkpoint.from_original import LEGACY_BUFFERS
from llava_mini.checkpoint.locate import locate
from llava_mini.checkpoint.source import LAYOUTS, Source, check_complete, expected_tensors, read_source
from llava_mini.checkpoint.tensors import read_folder, read_json
from llava_mini.config import KNOWN_VISION_TOWERS, LlavaMiniConfig, preset, tower_sizes
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.projector import Projector
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.prompt import load_template, marks_answers
from llava_mini.processor.published import published_settings, require_tokenizer

PrefusionStart = Literal["language-model", "random"]
"""What fresh pre-fusion layers start from: copies of the language model's first layers, or random weights."""

_TOWER_PREFIXES = ("vision_tower.", "vision_model.")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A language model that the paper builds on, by name."""

    language_model: str
    """Repository on the hub."""
    vision_tower: str
    preset: str
    """Preset with the sizes of the language model."""


BACKBONES: dict[str, Backbone] = {
    "vicuna-7b": Backbone(
        language_model="lmsys/vicuna-7b-v1.5",
        vision_tower="openai/clip-vit-large-patch14-336",
        preset="llava-mini-vicuna-7b",
    ),
    "llama-3.1-8b": Backbone(
        language_model="meta-llama/Llama-3.1-8B-Instruct",
        vision_tower="openai/clip-vit-large-patch14-336",
        preset="llava-mini-llama-3.1-8b",
    ),
}
"""The paper's language models. Any other Llama-like one is a folder or a name on the hub."""


@dataclass(frozen=True, kw_only=True)
class NewParts:
    """What is added to a model without a reducer and pre-fusion."""

    reducer: str = "query"
    reducer_grid: int = 1
    """Tokens per side of a frame: 1, and 8 for HD (section 4.3)."""
    reducer_tokens: int | None = None
    """Tokens of a frame, where they form no grid. None: as in the model."""
    prefusion_num_layers: int = 4
    prefusion_start: PrefusionStart = "language-model"
    resolution_ratio: int = 1
    """Crops per side: 2 is HD."""
    seed: int = 0
    """Of what is drawn."""


def parts_config(language_model: str, vision_tower: str | None) -> LlavaMiniConfig:
    """Configuration of the stage-1 model of two parts; no weights are read.

    Args:
        language_model: one of ``BACKBONES``, whose sizes are known here, a folder, or a name on the hub.
        vision_tower: a folder or a name on the hub. None: that of the backbone.

    Raises:
        ValueError: there is no such model, or it is not a Llama-like language model, or not a CLIP tower.
    """
    backbone = BACKBONES.get(language_model)
    text = preset(backbone.preset).text if backbone else _text_config(locate(language_model))
    return _stage_1_config(text, _tower_sizes(_tower_name(vision_tower, backbone)))


def join_parts(language_model: str, vision_tower: str | None, *, seed: int = 0) -> Source:
    """A stage-1 model of a language model, a CLIP tower and a fresh projector.

    Weights stay on disk until they are used. The projector starts as torch draws linear layers, like that of LLaVA.

    Args:
        language_model: one of ``BACKBONES``, a folder, or a name on the hub.
        vision_tower: a folder that holds a CLIP tower, or a name on the hub. None: that of the backbone.
        seed: of the projector.

    Raises:
        ValueError: there is no such model, or tensors are missing or misshapen.
    """
    backbone = BACKBONES.get(language_model)
    folder = locate(backbone.language_model if backbone else language_model)
    tower = locate(_tower_name(vision_tower, backbone))
    config = _stage_1_config(_text_config(folder), tower_sizes(str(tower), tower))
    tensors = {
        f"language_model.{name}": value
        for name, value in read_folder(folder).items()
        if not LEGACY_BUFFERS.search(name)
    }
    if config.tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight", None)
    tensors |= _tower_tensors(tower, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(config.vision.hidden_size, config.text.hidden_size).state_dict()
    tensors |= {f"projector.{name}": value for name, value in projector.items()}
    check_complete(tensors, config, folder)
    published = read_json(folder / "config.json")
    return Source(folder, "language_model", published, config, tensors)


def read_model(name: str) -> Source:
    """A model to go on with, in any layout that ``convert`` reads; weights stay on disk until they are used.

    Raises:
        ValueError: there is no such model, it is an adapter, or its tensors do not fit its configuration.
    """
    return read_source(locate(name))


def add_parts(source: Source, new: NewParts) -> Source:
    """Add a reducer and pre-fusion to a model that has neither; all of its own weights stay what they are.

    Raises:
        ValueError: the model has them already, or cannot have them.
    """
    if new.prefusion_start not in ("language-model", "random"):
        raise ValueError(f"Pre-fusion starts from language-model or random, got {new.prefusion_start!r}.")
    tensors, config = start_llava_mini(
        dict(source.tensors),
        source.config,
        reducer=new.reducer,
        reducer_grid=new.reducer_grid,
        reducer_tokens=new.reducer_tokens,
        prefusion_num_layers=new.prefusion_num_layers,
        resolution_ratio=new.resolution_ratio,
        seed=new.seed,
    )
    if new.prefusion_start == "random" and new.prefusion_num_layers:
        dtype = next(one.dtype for name, one in tensors.items() if name.startswith("projector."))
        tensors |= _random_prefusion(config, new.seed, dtype)
    folder = source.folder or Path()
    check_complete(tensors, config, folder)
    return Source(source.folder, source.layout, source.published, config, tensors, source.updates, source.generation)


def with_parts(config: LlavaMiniConfig, new: NewParts) -> LlavaMiniConfig:
    """The configuration that ``add_parts`` makes."""
    fields = {name: value for name, value in vars(new).items() if name in LlavaMiniConfig.__annotations__}
    if new.reducer_tokens is None:
        fields["reducer_tokens"] = config.reducer_tokens
    return LlavaMiniConfig(vision_config=config.vision, text_config=config.text, **fields)


def build_model(source: Source, dtype: torch.dtype) -> LlavaMiniForConditionalGeneration:
    """The model in memory, every tensor a copy of its own.

    Args:
        source: as read; it is left without tensors, so that memory holds the model once.
        dtype: number format of the weights.
    """
    tensors: dict[str, Tensor] = {}
    for name in list(source.tensors):
        tensors[name] = source.finish(name, source.tensors.pop(name)).to(dtype, copy=True)
    return LlavaMiniForConditionalGeneration.from_pretrained(
        None, config=deepcopy(source.config), state_dict=tensors, dtype=dtype
    )


def build_processor(source: Source, template: str | None = None) -> LlavaMiniProcessor:
    """The processor of a model that is to be trained.

    A model of ours keeps its own, told of the tokens and views of a frame. For another it is made from the tokenizer,
    with the chat template that is named, the tokenizer's own if that marks answers, or the one that belongs to its end
    token. Prompts begin with one begin-of-text token, as in the authors' training, if the tokenizer has any.

    Args:
        source: the model.
        template: name of a chat template. None: see above.

    Raises:
        ValueError: there is no tokenizer, no such template, or none is known for its end token.
    """
    config, folder = source.config, source.folder
    if folder is None:
        raise ValueError(
            "The model is in memory and has no tokenizer. Save it with its processor, and give the folder."
        )
    require_tokenizer(folder)
    if source.layout == "ours" and (folder / PROCESSOR_CONFIG).exists():
        kept = LlavaMiniProcessor.from_pretrained(folder)
        return refit(kept, config, load_template(template) if template else None)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    own, end = tokenizer.chat_template, tokenizer.eos_token
    own = own if isinstance(own, str) and marks_answers(own) else None
    settings: dict[str, Any] = {}
    if template is None and own is None:
        settings = published_settings(source.published, end if isinstance(end, str) else None)
        template = settings.pop("template")
    if source.layout == "language_model":
        settings = {}  # how its pictures are made square is new
    processor = LlavaMiniProcessor.from_config(config, tokenizer, template or "plain", **settings)
    return refit(processor, config, None if template else own)


def refit(processor: LlavaMiniProcessor, config: LlavaMiniConfig, chat_template: str | None) -> LlavaMiniProcessor:
    """A processor like this one for another number of tokens or views, with at most one begin-of-text token.

    Args:
        processor: stays as it is.
        config: of the model that reads what it makes.
        chat_template: in Jinja. None: the same.
    """
    return LlavaMiniProcessor(
        processor.tokenizer,
        image_token_id=cast(int, config.image_token_id),
        tokens_per_frame=config.tokens_per_frame,
        image_size=config.image_size,
        resolution_ratio=config.resolution_ratio,
        image_mode=processor.image_mode,
        frame_resize=processor.frame_resize,
        num_begin_tokens=min(processor.num_begin_tokens, 1),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        max_pixels=processor.max_pixels,
        chat_template=chat_template or cast(str, processor.chat_template),
    )


def build_generation(source: Source, processor: LlavaMiniProcessor) -> GenerationConfig:
    """Generation settings of the model that is trained: its own if it is ours, otherwise greedy, with its stop ids."""
    folder = source.folder
    if source.layout == "ours" and folder is not None and (folder / GENERATION_CONFIG).exists():
        return GenerationConfig.from_pretrained(folder)
    return generation_config(source, processor.tokenizer)


def _tower_name(vision_tower: str | None, backbone: Backbone | None) -> str:
    if vision_tower is None and backbone is None:
        raise ValueError(
            "A language model alone does not see. Name a CLIP tower too (vision_tower), for one "
            "openai/clip-vit-large-patch14-336."
        )
    return vision_tower or cast(Backbone, backbone).vision_tower


def _tower_sizes(name: str) -> dict[str, Any]:
    """Configuration dictionary of a tower, which is not fetched if its sizes are known."""
    if name in KNOWN_VISION_TOWERS:
        return tower_sizes(name, None)
    folder = locate(name)
    return tower_sizes(str(folder), folder)


def _text_config(folder: Path) -> PreTrainedConfig:
    model_type = read_json(folder / "config.json").get("model_type", "")
    if LAYOUTS.get(model_type) != "language_model":
        known = [name for name, layout in LAYOUTS.items() if layout == "language_model"]
        raise ValueError(
            f"{str(folder)!r} holds a model of the type {model_type!r}, not a Llama-like language model "
            f"({', '.join(known)}). A model that sees already is given as the model instead."
        )
    return AutoConfig.from_pretrained(folder)


def _stage_1_config(text: PreTrainedConfig, tower: dict[str, Any]) -> LlavaMiniConfig:
    return LlavaMiniConfig(vision_config=tower, text_config=text, reducer="identity", prefusion_num_layers=0)


def _tower_tensors(folder: Path, config: LlavaMiniConfig) -> dict[str, Tensor]:
    """The tensors of a tower, from a CLIP model, the tower alone, or a model of ours."""
    wanted = [name for name in expected_tensors(config) if name.startswith("vision_tower.")]
    stored: dict[str, Tensor] = {}
    for name, value in read_folder(folder).items():
        bare = name
        for prefix in _TOWER_PREFIXES:
            bare = bare.removeprefix(prefix)
        stored[f"vision_tower.{bare}"] = value
    return {name: stored[name] for name in wanted if name in stored}


def _random_prefusion(config: LlavaMiniConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh tensors of pre-fusion, drawn as transformers draws the layers of the language model."""
    text = {**config.text.to_dict(), "vocab_size": 1, "num_hidden_layers": config.prefusion_num_layers}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "layer_types"):
        text.pop(name, None)
    small = LlavaMiniConfig(
        vision_config={**config.vision.to_dict(), "num_hidden_layers": 1, "intermediate_size": 1},
        text_config=text,
        reducer="identity",
        prefusion_num_layers=config.prefusion_num_layers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prefusion = LlavaMiniForConditionalGeneration(small).prefusion
    assert prefusion is not None
    return {f"prefusion.{name}": tensor.to(dtype) for name, tensor in prefusion.state_dict().items()}
