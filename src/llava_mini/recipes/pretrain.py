"""Stage 1 of the paper: the projector alone learns to bring patches to the language model, on captions.

All patches go to the language model, without reduction and pre-fusion (section 4.3; Table 9: batch 256, rate 1e-3, one
epoch). Questions are left out: an image is followed by its caption, as in LLaVA.
"""

from dataclasses import dataclass
from pathlib import Path

from llava_mini.checkpoint.adapters import is_adapter
from llava_mini.checkpoint.assemble import BACKBONES, join_parts, parts_config, read_model
from llava_mini.checkpoint.locate import EMBEDDED
from llava_mini.config import PRESETS, LlavaMiniConfig, preset
from llava_mini.inference.loading import read_config
from llava_mini.recipes.tuning import Tuning, TuningSettings
from llava_mini.training.tuning_stages import STAGE_1


def pretrain_settings() -> TuningSettings:
    """Return the settings of Table 9 for stage 1, without data."""
    return TuningSettings(rates=STAGE_1, epochs=1.0, captions=True)


@dataclass(frozen=True, kw_only=True)
class StartOfPretraining:
    """What stage 1 starts from: two parts, or a model of a stage 1 that goes on."""

    language_model: str | None = None
    """One of ``assemble.BACKBONES``, a folder, or a name on the hub."""
    vision_tower: str | None = None
    """A folder that holds a CLIP tower, or a name on the hub. None: that of the backbone."""
    model: str | None = None
    """Instead of both: a model without reducer and pre-fusion."""

    def __post_init__(self) -> None:
        if (self.language_model is None) == (self.model is None):
            raise ValueError(
                "Stage 1 starts from a language model with a vision tower, or from a model that goes on. Give "
                "language_model (and vision_tower), or model."
            )


def pretrain(start: StartOfPretraining, settings: TuningSettings | None = None) -> Tuning:
    """Return stage 1: ask for its ``plan``, or ``run`` it.

    Args:
        start: What it starts from.
        settings: From ``pretrain_settings``, with data.

    Raises:
        ValueError: There are no such models, they do not fit together, the model has a reducer or pre-fusion, or there
            are to be low-rank updates.
    """
    settings = settings or pretrain_settings()
    if settings.lora is not None:
        raise ValueError("Stage 1 trains the projector alone. Leave lora out; train finetune has it.")
    name, tower = start.language_model, start.vision_tower
    if name is not None:
        seed = settings.seed
        words = f"{name} with {tower}" if tower else name
        return Tuning(
            "pretrain", words, settings, parts_config(name, tower), lambda: join_parts(name, tower, seed=seed)
        )
    model = start.model
    assert model is not None
    config = known_config(model)
    if config.reducer != "identity" or config.prefusion_num_layers:
        raise ValueError(
            f"Stage 1 trains the projector of a model without reducer and pre-fusion, but {model!r} has the reducer "
            f"{config.reducer!r} and {config.prefusion_num_layers} pre-fusion layers. It goes on with train finetune."
        )
    return Tuning("pretrain", model, settings, config, lambda: read_model(model))


def known_config(model: str) -> LlavaMiniConfig:
    """The configuration of a model, whose weights are not read; presets and the stage 1 of a backbone have none at all.

    Raises:
        ValueError: There is no such model or preset, or it is an adapter.
    """
    if model in PRESETS and model not in EMBEDDED:
        return preset(model)
    if model in BACKBONES:
        return parts_config(model, None)
    folder = Path(model).expanduser()
    if folder.is_dir() and is_adapter(folder):
        raise ValueError(
            f"{model!r} holds an adapter. Merge it first: llava-mini convert {model} DST --base MODEL; training goes "
            "on from DST."
        )
    try:
        return read_config(model)
    except ValueError:
        return read_model(model).config
