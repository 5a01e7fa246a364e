"""What ``llava-mini train`` runs: recipes with the flags that were given, their plans, and what they leave behind.

Plans and the name of the finished model go to stdout; progress, warnings and errors to stderr.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_mini.checkpoint.assemble import NewParts
from llava_mini.recipes.finetune import finetune as finetune_recipe
from llava_mini.recipes.finetune import finetune_settings, hd_parts
from llava_mini.recipes.pretrain import StartOfPretraining, pretrain_settings
from llava_mini.recipes.pretrain import pretrain as pretrain_recipe
from llava_mini.recipes.tuning import Tuning, TuningSettings
from llava_mini.recipes.tuning_data import find_data
from llava_mini.training.devices import choose_hardware, require_flash_attention
from llava_mini.training.lora import LoraSettings
from llava_mini.training.plan import Devices
from llava_mini.training.sharding import EngineSettings
from llava_mini.training.world import World

if TYPE_CHECKING:
    from llava_mini_cli_train import Finetune, Pretrain, Study

PATIENCE_MINUTES = 60.0
"""How long processes wait for the first one, which alone fetches a model, looks at the data, and saves the result."""


def train_tiny(
    output: Path | None,
    *,
    smoke: bool,
    minutes: float | None,
    slice_minutes: float | None,
    device: str | None,
    threads: int | None,
    workers: int | None,
) -> bool:
    """Train the embedded model, or go on with a run that was cut off; as in ``recipes.tiny``.

    Returns:
        Whether the run is finished.
    """
    from llava_mini.recipes.tiny import train_tiny

    output = output or Path("runs") / ("tiny-smoke" if smoke else "tiny")
    hardware = choose_hardware(device, threads, workers)
    scores = train_tiny(output, smoke=smoke, minutes=minutes, slice_minutes=slice_minutes, hardware=hardware)
    if scores:
        print(output / "model")
    return bool(scores)


def train_study(flags: "Study") -> int:
    """Train what is left of the study, or print what there is; as in ``recipes.study``.

    Returns:
        The exit code: 0 when all is done, 3 when a slice ended before.
    """
    from llava_mini.recipes import study

    output = flags.output or Path("runs") / ("study-smoke" if flags.smoke else "study")
    if flags.table:
        print(study.study_table(study.read_study(output)))
        return 0
    done = study.train_study(
        output,
        study.study_settings(smoke=flags.smoke, steps=flags.steps),
        rows=flags.rows or (study.SMOKE_ROWS if flags.smoke else ()),
        num_seeds=(1 if flags.smoke else 3) if flags.seeds is None else flags.seeds,
        hardware=choose_hardware(flags.device, flags.threads, flags.workers),
        slice_minutes=flags.slice_minutes,
    )
    return 0 if done else 3


def pretrain(flags: "Pretrain", environment: Mapping[str, str]) -> int:
    """Plan or run stage 1.

    Args:
        flags: As they were typed.
        environment: In which ``torchrun`` tells each process who it is.

    Returns:
        The exit code: 0 when the run is finished, or only a plan was asked for; 3 when a slice ended before.
    """
    settings = _settings(flags, pretrain_settings())
    settings = replace(settings, captions=not flags.questions)
    start = StartOfPretraining(language_model=flags.language_model, vision_tower=flags.vision_tower, model=flags.model)
    return _run(pretrain_recipe(start, settings), flags, environment)


def finetune(flags: "Finetune", environment: Mapping[str, str]) -> int:
    """Plan or run stage 2; as ``pretrain``."""
    settings = _settings(flags, finetune_settings())
    given = _given(
        {
            "language_model": flags.language_model_rate,
            "reducer": flags.reducer_rate,
            "prefusion": flags.prefusion_rate,
            "low_rank": flags.lora_rate,
        }
    )
    settings = replace(settings, rates=replace(settings.rates, **given), lora=_lora(flags))
    return _run(finetune_recipe(flags.model, settings, new=_new_parts(flags)), flags, environment)


def _settings(flags: "Pretrain | Finetune", defaults: TuningSettings) -> TuningSettings:
    files, stream = find_data(flags.data, flags.media, flags.weights, flags.seed, flags.window)
    return replace(
        defaults,
        **_given({"epochs": flags.epochs}),
        files=files,
        stream=stream,
        rates=replace(defaults.rates, **_given({"projector": flags.projector_rate})),
        batch=flags.batch,
        micro_batch=flags.micro_batch,
        steps=flags.steps,
        template=flags.template,
        max_length=flags.max_length,
        num_frames=flags.frames,
        fps=flags.fps,
        max_frames=flags.max_frames,
        features=flags.features,
        max_damaged_share=flags.max_damaged_share,
        checkpoint_minutes=flags.checkpoint_minutes,
        keep_last=flags.keep_last,
        dtype=getattr(torch, flags.dtype),
        seed=flags.seed,
    )


def _given(flags: Mapping[str, object]) -> dict[str, Any]:
    """What was typed; what was left out keeps its default."""
    return {name: value for name, value in flags.items() if value is not None}


def _lora(flags: "Finetune") -> LoraSettings | None:
    """What was said about low-rank updates; None if there are to be none.

    Raises:
        ValueError: A flag has no meaning beside the others.
    """
    given = _given(
        {
            "rank": flags.lora_rank,
            "alpha": flags.lora_alpha,
            "dropout": flags.lora_dropout,
            "prefusion": flags.lora_prefusion or None,
            "four_bit": flags.four_bit or None,
        }
    )
    if not flags.lora and (given or flags.lora_rate is not None):
        raise ValueError("--four-bit and all flags like --lora-rank are about low-rank updates. Give --lora with them.")
    if flags.lora and flags.language_model_rate is not None:
        raise ValueError("With --lora the language model's own weights are frozen. Give --lora-rate, of its updates.")
    if flags.lora_prefusion and flags.prefusion_rate is not None:
        raise ValueError("With --lora-prefusion pre-fusion's own weights are frozen. Give --lora-rate, of its updates.")
    return LoraSettings(**given) if flags.lora else None


def _new_parts(flags: "Finetune") -> NewParts | None:
    """What was said about new parts; None if nothing was."""
    given = _given(
        {
            "reducer": flags.reducer,
            "reducer_grid": flags.reducer_grid,
            "reducer_tokens": flags.reducer_tokens,
            "prefusion_num_layers": flags.prefusion_layers,
            "prefusion_start": flags.prefusion_start,
        }
    )
    if not given and not flags.hd:
        return None
    return replace(hd_parts() if flags.hd else NewParts(), **given)


def _run(tuning: Tuning, flags: "Pretrain | Finetune", environment: Mapping[str, str]) -> int:
    if flags.gpus is not None and not flags.dry_run:
        raise ValueError("--gpus is for --dry-run. To train on several, start with torchrun --nproc-per-node N.")
    if flags.dry_run:
        number = flags.gpus or 1
        print(tuning.plan(_devices(flags, number)))
        return 0
    if not flags.data:
        raise ValueError("There is no data to train on. Give JSON or JSONL files in the format of LLaVA, or shards.")
    if flags.check:
        return 0 if _is_clean(tuning) else 1
    hardware = choose_hardware(flags.device, flags.threads, flags.workers)
    world = World.from_environment(environment, device=hardware.device, minutes=PATIENCE_MINUTES)
    with world.speaking_once("llava-mini"), world:
        if flags.attention == "flash_attention_2":  # before anything is read
            world.each(lambda: require_flash_attention(world.device, tuning.settings.dtype))
        devices = _devices(flags, world.size)
        plan = world.first(lambda: str(tuning.plan(devices)))
        if world.is_first:
            print(plan, flush=True)
        output = flags.output or Path("runs") / tuning.name
        engine = EngineSettings(
            strategy=devices.strategy,
            checkpoint_activations=devices.checkpointing,
            compile_layers=flags.compile,
            attention=flags.attention,
        )
        run = tuning.run(output, engine=engine, world=world)
        run.execute(hardware=hardware, slice_minutes=flags.slice_minutes, world=world, tracker=flags.tracker)
        finished = world.first(lambda: run.is_finished)
        if finished and world.is_first:
            print(run.model_dir)
        return 0 if finished else 3


def _is_clean(tuning: Tuning) -> bool:
    """Read the data as the stage would, for the model that trains: with its new parts, where it is given any."""
    from llava_mini.commands import checked
    from llava_mini.data.check import CheckSettings

    settings = tuning.settings
    wanted = CheckSettings(
        num_frames=settings.num_frames,
        fps=settings.fps,
        max_frames=settings.max_frames,
        max_length=settings.max_length,
        captions=settings.captions,
    )
    return checked(settings.files, settings.stream, tuning.collator.processor, tuning.config, wanted).is_clean


def _devices(flags: "Pretrain | Finetune", number: int) -> Devices:
    strategy = "none" if number == 1 else flags.strategy or "fsdp"
    return Devices(number=number, strategy=strategy, checkpointing=not flags.keep_activations)
