"""Stage 2 of the paper: everything but the vision tower learns to follow instructions, through few vision tokens.

It starts from the model of stage 1 or from LLaVA-1.5, which get a reducer and pre-fusion, or goes on from any
LLaVA-Mini, of which nothing is drawn anew (Table 9: batch 256, language model 1e-4, all others 1e-5, two epochs).
"""

from dataclasses import replace

from llava_mini.checkpoint.assemble import NewParts, add_parts, read_model, with_parts
from llava_mini.checkpoint.source import Source
from llava_mini.recipes.pretrain import known_config
from llava_mini.recipes.tuning import Tuning, TuningSettings


def finetune_settings() -> TuningSettings:
    """Return the settings of Table 9 for stage 2, without data."""
    return TuningSettings()


def hd_parts() -> NewParts:
    """Return the parts of the HD model: four crops and the whole image in 64 tokens (section 4.3)."""
    return NewParts(reducer_grid=8, resolution_ratio=2)


def finetune(model: str, settings: TuningSettings | None = None, *, new: NewParts | None = None) -> Tuning:
    """Return stage 2: ask for its ``plan``, or ``run`` it.

    Args:
        model: A folder or a name on the hub, in any layout that ``llava-mini convert`` reads; for a plan, a preset too.
        settings: From ``finetune_settings``, with data.
        new: What a model without reducer and pre-fusion gets. None: what the paper has, 1 token and 4 layers. A model
            that has them keeps them, and nothing may be given.

    Raises:
        ValueError: There is no such model, or it has the parts that are to be added.
    """
    settings = settings or finetune_settings()
    config = known_config(model)
    if config.reducer == "identity" and not config.prefusion_num_layers:
        parts = replace(new or NewParts(), seed=settings.seed)
        return Tuning("finetune", model, settings, with_parts(config, parts), lambda: _started(model, parts))
    if new is not None:
        raise ValueError(
            f"{model!r} has the reducer {config.reducer!r} and {config.prefusion_num_layers} pre-fusion layers already "
            "and goes on with them. Leave out what describes new ones, or start from the model of stage 1."
        )
    return Tuning("finetune", model, settings, config, lambda: read_model(model))


def _started(model: str, parts: NewParts) -> Source:
    return add_parts(read_model(model), parts)
