"""Model configuration and named presets.

One class describes every model of the paper (arXiv 2501.03895): the reducer says how a frame
becomes tokens, ``prefusion_num_layers`` how deep the text reads all patches before the language
model. (identity, 0) is LLaVA-v1.5 and training stage 1, (query, 4) is LLaVA-Mini, (query, 0) is
Table 10, (identity, 4) is Table 11, (average_pool, 4) is Table 8.
"""

import json
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from llava_mini.reducer_settings import REDUCER_SETTINGS, check_reducer

RELEASED_MODEL_TYPE = "llava_mini_llama"
"""``model_type`` of the configurations published by the authors."""

CLIP_VIT_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

KNOWN_VISION_TOWERS: dict[str, dict[str, Any]] = {"openai/clip-vit-large-patch14-336": CLIP_VIT_L_336}
"""Towers that a released configuration names without giving their sizes."""


class LlavaMiniConfig(PreTrainedConfig):
    """Configuration of ``LlavaMiniForConditionalGeneration``.

    Unknown keys are kept, as in every transformers configuration, unless they look like a
    misspelling of a field below, which raises ``ValueError``.
    """

    model_type = "llava_mini"
    sub_configs: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleMethodOverride]
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    """A CLIP vision encoder. None: CLIP ViT-L/14 at 336 px."""
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    """Any Llama-like causal language model. None: transformers' default Llama."""
    reducer: str = "query"
    """How the patches of a frame become tokens; a name of ``REDUCER_SETTINGS``. ``identity`` keeps all of them."""
    reducer_grid: int = 1
    """Tokens per side: a frame becomes ``reducer_grid ** 2`` tokens. Read by reducers whose tokens form a grid."""
    reducer_tokens: int = 16
    """Tokens of a frame. Read by reducers whose tokens form no grid."""
    reducer_layer: int = 2
    """Layers of the language model that read all rows of a frame. Read by reducers that drop some inside it."""
    prefusion_num_layers: int = 4
    """Decoder layers in which the text reads all patches before the language model (section 4.2)."""
    resolution_ratio: int = 1
    """Crops per side for HD images: 1 is one view, r > 1 is r * r crops and the whole image."""
    vision_tokens_from: str = "prefusion"
    """Where the language model's vision tokens leave: ``prefusion`` (released weights: reduced rows
    enter after the patches and leave its last layer) or ``reducer`` (the paper's text). ``nowhere``: the language
    model reads none, and sees only what pre-fusion has put into the text."""
    fuse_token_id_zero: bool = True
    """Whether a real token with id 0 is fused. Released weights were trained with it left out."""
    position_codes: str = "patch_grid"
    """Codes of the patches in the query reducer: ``patch_grid``, sine and cosine of their own grid, or
    ``resized_query_grid``, the queries' codes resized bicubically (released weights)."""
    fuse_answers: bool = False
    """Whether earlier answers are fused when a conversation goes on. Released weights: yes, although
    no answer was fused in training. Answers with labels never are."""
    image_token_id: int | None = None
    """Id that marks the places of vision tokens. None: the size of the vocabulary, so it is never embedded."""
    tie_word_embeddings: bool = False
    """Set from ``text_config``, which decides."""

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_misspelt(kwargs, list(LlavaMiniConfig.__annotations__))
        self.vision_config = _sub_config(self.vision_config, CLIPVisionConfig, CLIP_VIT_L_336)
        self.text_config = _sub_config(self.text_config, LlamaConfig, {})
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in ("fuse_token_id_zero", "fuse_answers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LlavaMiniConfig.{name} is True or False, got {getattr(self, name)!r}.")
        for name, least in {**_LEAST, "image_token_id": None}.items():
            _check_number(name, getattr(self, name), least)
        _one_of("reducer", self.reducer, tuple(REDUCER_SETTINGS))
        _one_of("vision_tokens_from", self.vision_tokens_from, ("prefusion", "reducer", "nowhere"))
        _one_of("position_codes", self.position_codes, ("patch_grid", "resized_query_grid"))
        vision = self.vision
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"LlavaMiniConfig.vision_config is of type {vision.model_type!r}; only 'clip_vision_model' is "
                "supported. Give a CLIPVisionConfig."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"The vision tower's image_size {self.image_size} is not a multiple of its patch_size "
                f"{self.patch_size}. Change one of them in vision_config."
            )
        check_reducer(self, vision.hidden_size)
        if self.image_token_id < self.text.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} is an id of the vocabulary (size {self.text.vocab_size}). It "
                "marks places and is never embedded: leave it out, or give an id from the vocabulary's size on."
            )

    @property
    def vision(self) -> CLIPVisionConfig:
        """``vision_config``, always an object."""
        return cast(CLIPVisionConfig, self.vision_config)

    @property
    def text(self) -> PreTrainedConfig:
        """``text_config``, always an object."""
        return cast(PreTrainedConfig, self.text_config)

    @property
    def image_size(self) -> int:
        """Pixels per side of the square pictures that the vision tower reads."""
        return cast(int, self.vision.image_size)

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch."""
        return cast(int, self.vision.patch_size)

    @property
    def patches_per_side(self) -> int:
        """Patches per side of one view."""
        return self.image_size // self.patch_size

    @property
    def views_per_frame(self) -> int:
        """Pictures the vision tower sees for a frame: 1, or the crops and the whole image."""
        return 1 if self.resolution_ratio == 1 else self.resolution_ratio**2 + 1

    @property
    def patches_per_frame(self) -> int:
        """P: patches of all views of a frame."""
        return self.views_per_frame * self.patches_per_side**2

    @property
    def reduced_side(self) -> int:
        """Side of the grid of patches that a reducer reads: in HD that of all crops, without the whole image."""
        return self.resolution_ratio * self.patches_per_side

    @property
    def reduced_patches(self) -> int:
        """Patches of a frame that a reducer reads."""
        return self.reduced_side**2

    @property
    def tokens_per_frame(self) -> int:
        """Q: what a frame costs the language model, at most where frames differ.

        The numbers that decide it may be changed after training, so they are checked here too.

        Raises:
            ValueError: a number was set that the reducer cannot make.
        """
        for name in ("reducer_grid", "reducer_tokens"):
            _check_number(name, getattr(self, name), _LEAST[name])
        check_reducer(self, self.vision.hidden_size)
        return REDUCER_SETTINGS[self.reducer].tokens(self)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's configuration, which transformers' ``generate`` asks for."""
        return self.text

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read our dictionary, or translate one published by the authors, whose tower may be a neighbouring file."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == RELEASED_MODEL_TYPE:
            config_dict = translate_released(config_dict, Path(pretrained_model_name_or_path))
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make a configuration from our dictionary, or from one published by the authors."""
        if config_dict.get("model_type") == RELEASED_MODEL_TYPE:
            folder = kwargs.get("name_or_path")  # AutoConfig gives it
            config_dict = translate_released(config_dict, Path(folder) if folder else None)
        return super().from_dict(dict(config_dict), **kwargs)


class ReleasedConfig(LlavaMiniConfig):
    """The authors' ``model_type``, for ``AutoConfig``: reading one gives a ``LlavaMiniConfig``."""

    model_type = RELEASED_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Translate to a ``LlavaMiniConfig``."""
        return cast(Self, LlavaMiniConfig.from_dict(config_dict, **kwargs))


def find_vision_tower(name: str, folder: Path | None) -> Path | None:
    """The file or folder that ``mm_vision_tower`` means: in the model's folder or beside it. None: there is none."""
    if not name or folder is None:
        return None
    folder = folder.parent if folder.is_file() else folder
    places = (place / part for part in (name, Path(name).name) for place in (folder, folder.parent))
    return next((path for path in places if path.exists()), None)


def tower_sizes(name: str, folder: Path | None) -> dict[str, Any]:
    """Configuration dictionary of the tower that ``mm_vision_tower`` names: a neighbour's, or a known one.

    Raises:
        ValueError: there is no such file or folder, and the name is not a known one.
    """
    path = find_vision_tower(name, folder)
    if path is not None and path.is_dir():
        path = path / "config.json" if (path / "config.json").exists() else None
    if path is not None:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {**sizes.get("vision_config", sizes), "model_type": "clip_vision_model"}
    if name in KNOWN_VISION_TOWERS:
        return {**KNOWN_VISION_TOWERS[name], "model_type": "clip_vision_model"}
    raise ValueError(
        f"The configuration names the vision tower {name!r}, whose sizes are not known (known: "
        f"{', '.join(KNOWN_VISION_TOWERS)}). Put its vision_config.json into the model's folder and name that file in "
        "mm_vision_tower."
    )


def translate_released(released: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Our configuration dictionary for one published by the authors.

    The vision tower's sizes come from ``vision_config`` where it is given, otherwise from what
    ``mm_vision_tower`` names: a file or folder beside the model, or a known tower.

    Args:
        released: the authors' dictionary.
        folder: the model's folder.

    Raises:
        ValueError: the tower is unknown, or a field has a value that this model does not have.
    """
    for key, expected in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_vision_select_layer", -2),
        ("mm_vision_select_feature", "patch"),
    ):
        if released.get(key, expected) != expected:
            raise ValueError(
                f"The released configuration has {key}={released[key]!r}, but LLaVA-Mini has {expected!r}. "
                "Is this the configuration of another model?"
            )
    vision = released.get("vision_config") or tower_sizes(released.get("mm_vision_tower", ""), folder)
    ours = {"mm_vision_tower", "vision_config", "architectures", "model_type", "auto_map"}
    text = {
        key: value
        for key, value in released.items()
        if key not in ours | _RELEASED_KEYS and not key.startswith(("mm_", "tokenizer_"))
    }
    _reject_misspelt(text, ["compressor_size", "prefusion_layer_num", "resolution_ratio"])
    return {
        "model_type": LlavaMiniConfig.model_type,
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "text_config": {**text, "model_type": "llama"},
        "reducer": "query",
        "reducer_grid": released.get("compressor_size", 2),
        "prefusion_num_layers": released.get("prefusion_layer_num", 4),
        "resolution_ratio": released.get("resolution_ratio", 1),
        "vision_tokens_from": "prefusion",
        "fuse_token_id_zero": False,
        "position_codes": "resized_query_grid",
        "fuse_answers": True,
        **{key: released[key] for key in ("torch_dtype", "dtype") if released.get(key)},
    }


_RELEASED_KEYS = {
    "compressor_size",
    "prefusion_layer_num",
    "resolution_ratio",
    "image_aspect_ratio",
    "tune_mm_mlp_adapter",
    "freeze_mm_mlp_adapter",
    "use_mm_proj",
    "unfreeze_mm_vision_tower",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
}


def _sub_config(
    value: PreTrainedConfig | dict[str, Any] | None, default: type[PreTrainedConfig], sizes: Mapping[str, Any]
) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    if value is None:
        return default(**sizes)
    if not isinstance(value, Mapping):
        raise ValueError(f"A part of a LlavaMiniConfig is a configuration or a dictionary, got {value!r}.")
    fields: dict[str, Any] = {**value}
    return AutoConfig.for_model(str(fields.pop("model_type", default.model_type)), **fields)


_LEAST = {"reducer_grid": 1, "reducer_tokens": 1, "reducer_layer": 1, "prefusion_num_layers": 0, "resolution_ratio": 1}
"""Whole numbers of a configuration, and the smallest that each may be."""


def _check_number(name: str, value: Any, least: int | None) -> None:
    if type(value) is not int:
        raise ValueError(f"LlavaMiniConfig.{name} is a whole number, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"LlavaMiniConfig.{name} must be at least {least}, got {value}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"LlavaMiniConfig.{name} is one of {', '.join(allowed)}; got {value!r}.")


def _reject_misspelt(unknown: Mapping[str, Any], fields: list[str]) -> None:
    for key in unknown:
        if close := get_close_matches(key, fields, n=1, cutoff=0.75):
            raise ValueError(f"LlavaMiniConfig has no field {key!r}. Did you mean {close[0]!r}?")


def _vicuna_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def _llama_3_1_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        pad_token_id=128004,
        dtype="bfloat16",
    )


def _released(text: LlamaConfig, **fields: Any) -> LlavaMiniConfig:
    return LlavaMiniConfig(
        text_config=text,
        fuse_token_id_zero=False,
        position_codes="resized_query_grid",
        fuse_answers=True,
        dtype="bfloat16",
        **fields,
    )


def _tiny() -> LlavaMiniConfig:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=7,
        num_attention_heads=3,
        image_size=96,
        patch_size=8,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.06,
    )
    return LlavaMiniConfig(vision_config=vision, text_config=text, prefusion_num_layers=3)


PRESETS: dict[str, Callable[[], LlavaMiniConfig]] = {
    "tiny": _tiny,
    "llava-v1.5-7b": lambda: LlavaMiniConfig(
        text_config=_vicuna_7b(), reducer="identity", prefusion_num_layers=0, dtype="bfloat16"
    ),
    "llava-mini-vicuna-7b": lambda: _released(_vicuna_7b()),
    "llava-mini-hd-vicuna-7b": lambda: _released(_vicuna_7b(), resolution_ratio=2, reducer_grid=8),
    "llava-mini-llama-3.1-8b": lambda: _released(_llama_3_1_8b()),
}
"""Named configurations. ``tiny`` is the embedded model; the others have the sizes of the papers."""


def preset(name: str) -> LlavaMiniConfig:
    """The configuration called ``name``.

    Raises:
        ValueError: no preset has this name; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. The presets are: {', '.join(PRESETS)}.")
    return PRESETS[name]()
