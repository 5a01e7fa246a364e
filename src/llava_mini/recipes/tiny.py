"""From nothing to the embedded tiny model: a run of six phases on the drawn world.

    vision     a CLIP encoder learns what each patch shows, and with the reducer what a whole picture shows
    language   a Llama-like model learns to answer questions about described scenes
    stage-1    the paper's: the projector alone, all patches, no pre-fusion, captions
    alignment  projected patches come to lie where their words lie
    stage-2    the paper's: everything but the vision encoder, one token a frame, pre-fusion
    finishing  stage 2 goes on at a lower rate, with more clips and with pictures unlike the drawn world

Vision, language and alignment stand in for what LLaVA takes from CLIP and Vicuna. Alignment comes after
stage 1, because captions alone pull the projector away from the words again: colours were lost. Every phase
resumes from its own checkpoint, so a run that was killed goes on where it was when it is started again.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.data.collate import Collator
from llava_mini.data.records import Record
from llava_mini.data.synthetic.scenes import WORDS, SceneSettings
from llava_mini.data.synthetic.world import CLIP_KINDS, IMAGE_KINDS, WorldSettings, world_item, world_record
from llava_mini.data.tokenizer import build_tokenizer, read_tokenizer, write_tokenizer
from llava_mini.evaluation.bench import Bench, run_bench
from llava_mini.evaluation.exact_match import CAPTION_KINDS, Score, scores
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.recipes.run import Phase, Run
from llava_mini.training.checkpoints import replaced
from llava_mini.training.devices import Hardware, choose_hardware
from llava_mini.training.language_pretraining import LanguagePretraining
from llava_mini.training.multimodal import Alignment, InstructionTuning, TunedModel
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import PhaseSettings, Task, load_weights
from llava_mini.training.vision_pretraining import VisionPretraining

EMPHASIS = {
    **dict.fromkeys(("existence", "colour", "shape", "size", "absence", "clip colour", "clip absence"), 0.7),
    **dict.fromkeys(("relation", "attribute count", "text"), 1.5),
    **dict.fromkeys(("direction", "order", "change", "event count"), 1.5),
}
"""What is learned late is asked more often than what is learned soon."""

FINISHING_EMPHASIS = {**EMPHASIS, "change": 3.0, "order": 2.0, "event count": 2.0, "clip place": 1.5}
"""In the last phase, what happens in clips is asked more often still."""


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    """What decides what comes out of a run, besides the code."""

    config: LlavaMiniConfig
    dtype: torch.dtype = torch.bfloat16
    """Precision of weights and arithmetic. Updates are made in float32."""
    seed: int = 0
    """Of the initial weights; what is drawn depends on split and index alone."""
    world: WorldSettings
    """What stage 2 asks, and what is scored."""
    vision_scenes: SceneSettings
    """What the vision encoder sees besides pages of letters."""
    vision_pages: tuple[float, float] = (0.8, 0.2)
    """Share of these pages, at the first step and at the last."""
    vision_steps: int
    language_steps: int
    alignment_steps: int
    stage_1_steps: int
    stage_2_steps: int
    finishing_steps: int
    vision_batch: int = 32
    language_batch: int = 24
    batch: int = 16
    """Pictures of a step in the other phases; twice as many in alignment."""
    vision_rate: float = 2e-3
    language_rate: float = 1e-3
    rate: float = 1e-3
    """Of stage 2. Alignment and stage 1 use twice as much."""
    thing_weight: float = 1.0
    """Weight of the training-only losses on things in stage 2."""
    conversation_every: int = 8
    """One step of so many in stage 2 has conversations; in the others each question stands alone."""
    clip_start: float = 0.1
    """Share of stage 2 after which clips are asked about too."""
    clip_turns: int = 2
    """Most questions about a clip in stage 2. Another clip teaches more than more questions, which cost as much."""
    emphasis: dict[str, float] = field(default_factory=lambda: dict(EMPHASIS))
    """How much more often stage 2 asks some kinds of questions than ``world`` says."""
    finishing_rate: float = 8e-4
    finishing_emphasis: dict[str, float] = field(default_factory=lambda: dict(FINISHING_EMPHASIS))
    """Takes the place of ``emphasis`` there."""
    finishing_clips: float = 0.6
    """Share of records about clips there, if the world has clips."""
    finishing_empty: float = 0.1
    """Share of scenes without things there; half of them have odd backgrounds."""
    num_validation: int = 600
    """About how many questions are scored at the end: as many of each kind about images, half as many about clips."""

    def __post_init__(self) -> None:
        unknown = {*self.emphasis, *self.finishing_emphasis} - {*IMAGE_KINDS, *CLIP_KINDS}
        if unknown:
            raise ValueError(
                f"emphasis names kinds of questions that there are not: {', '.join(sorted(unknown))}. The kinds are "
                f"{', '.join((*IMAGE_KINDS, *CLIP_KINDS))}."
            )
        least = min(self.clip_turns, self.conversation_every)
        if least < 1:
            raise ValueError(f"clip_turns and conversation_every must be at least 1, got {least}.")


def tiny_settings(*, smoke: bool = False, minutes: float | None = None) -> TinySettings:
    """Return the settings of a full run, or of one of under two minutes.

    Args:
        smoke: A run that passes through every phase with scenes of one thing and two kinds of questions.
        minutes: Scale the steps of a full run to about so many minutes on two cores with fast bfloat16
            arithmetic. None: the full number of steps.

    Raises:
        ValueError: If the minutes are not positive, or given for a smoke run.
    """
    if smoke:
        if minutes is not None:
            raise ValueError(f"A smoke run has a fixed length, but minutes={minutes} was given. Leave one of them out.")
        return _smoke_settings()
    full = TinySettings(
        config=preset("tiny"),
        world=WorldSettings(
            scene=SceneSettings(sign_share=0.4, chart_share=0.1), min_turns=6, max_turns=6, clip_share=0.4
        ),
        vision_scenes=SceneSettings(sign_share=0.5, chart_share=0.12),
        vision_pages=(0.8, 0.25),
        vision_steps=6000,
        language_steps=4000,
        alignment_steps=1500,
        stage_1_steps=100,
        stage_2_steps=8000,
        finishing_steps=7000,
    )
    if minutes is None:
        return full
    if not 0 < minutes < math.inf:
        raise ValueError(f"A run needs a positive number of minutes, got {minutes}.")
    names = [part.name for part in fields(TinySettings) if part.name.endswith("_steps")]
    return replace(full, **{name: max(round(getattr(full, name) * minutes / FULL_MINUTES), 1) for name in names})


FULL_MINUTES = 215
"""About how long the full run takes on two cores with bfloat16 matrix units."""


def train_tiny(
    output_dir: Path | str,
    *,
    smoke: bool = False,
    minutes: float | None = None,
    resume: bool = True,
    slice_minutes: float | None = None,
    hardware: Hardware | None = None,
) -> dict[str, Score]:
    """Train the tiny model into a folder, from its last checkpoint if there is one.

    Args:
        output_dir: Folder of the run: settings, log, curves, checkpoints, scores, and the model in ``model``.
        smoke: All phases in under two minutes, on easy scenes.
        minutes: About how long a full run may take; None for the full length.
        resume: Whether a run that is already in the folder is gone on with.
        slice_minutes: Stop after so long, where the next call goes on. None: run to the end.
        hardware: Where to train, from ``choose_hardware``; a GPU if there is one when not given.

    Returns:
        Scores on the validation split, by kind of question; empty if the slice ended before the run did.

    Raises:
        ValueError: If the folder holds another run, or the loss is not finite.
    """
    run = tiny(output_dir=Path(output_dir), smoke=smoke, minutes=minutes)
    return run.execute(resume=resume, hardware=hardware or choose_hardware(), slice_minutes=slice_minutes)


def tiny(*, output_dir: Path, smoke: bool = False, minutes: float | None = None) -> Run:
    """Return the complete run, not yet started. The arguments are those of ``train_tiny``."""
    return tiny_run(tiny_settings(smoke=smoke, minutes=minutes), output_dir)


def tiny_run(settings: TinySettings, output_dir: Path) -> Run:
    """Return a run with settings of one's own."""
    tokenizer = cache(lambda: _kept_tokenizer(settings, output_dir / "tokenizer.json"))

    language_world = replace(settings.world, clip_share=0.0 if settings.world.clip_share == 0 else 0.2)

    def vision() -> VisionPretraining:
        reducer = _build(settings, settings.config.reducer).reducer
        torch.manual_seed(settings.seed)
        return VisionPretraining(
            settings.config,
            reducer,
            num_steps=settings.vision_steps,
            batch_size=settings.vision_batch,
            dtype=settings.dtype,
            settings=settings.vision_scenes,
            pages=settings.vision_pages,
        )

    def language() -> LanguagePretraining:
        torch.manual_seed(settings.seed)
        return LanguagePretraining(
            settings.config.text,
            tokenizer(),
            batch_size=settings.language_batch,
            dtype=settings.dtype,
            settings=language_world,
        )

    def stage_1() -> InstructionTuning:
        model = _build(settings, "identity")
        encoder, decoder = vision(), language()
        load_weights(encoder.module, output_dir / "vision")
        load_weights(decoder.module, output_dir / "language")
        model.vision_tower.load_state_dict(encoder.module.tower.state_dict())
        model.language_model.load_state_dict(decoder.module.state_dict())
        return tuning_of(settings, model, tokenizer(), partial(_caption_records, settings), thing_weight=0.0)

    def alignment() -> Alignment:
        before = stage_1().module
        load_weights(before, output_dir / "stage-1")
        return Alignment(before.model, tokenizer(), batch_size=2 * settings.batch, settings=settings.world.scene)

    def stage_2() -> InstructionTuning:
        before, encoder = alignment().module, vision()
        load_weights(before, output_dir / "alignment")
        load_weights(encoder.module, output_dir / "vision")
        model = _build(settings, settings.config.reducer)
        model.vision_tower.load_state_dict(before.vision_tower.state_dict())
        model.reducer.load_state_dict(encoder.module.reducer.state_dict())
        model.projector.load_state_dict(before.projector.state_dict())
        model.language_model.load_state_dict(before.language_model.state_dict())
        if model.prefusion is not None:
            model.prefusion.copy_from(model.language_model.model.layers)
        return tuning_of(
            settings,
            model,
            tokenizer(),
            partial(_stage_2_records, settings),
            thing_weight=settings.thing_weight,
            conversation_every=settings.conversation_every,
        )

    def finishing() -> InstructionTuning:
        before = stage_2()
        load_weights(before.module, output_dir / "stage-2")
        before.make_batch = replace(before.make_batch, records_of=partial(_finishing_records, settings))
        return before

    projector_only = (
        Rule(part=r"(model\.)?projector\.", rate=2 * settings.rate),
        Rule(part=r"(?!(model\.)?projector\.)", rate=0.0),
    )
    return Run(
        name="tiny",
        settings=facts_of(settings),
        dtype=settings.dtype,
        output_dir=output_dir,
        save=_save,
        score=lambda task: score_tiny(*parts_of(task), settings),
        phases=(
            Phase(
                settings=PhaseSettings(name="vision", num_steps=settings.vision_steps, stage=_vision_stage(settings)),
                purpose="a CLIP encoder learns what each patch shows, and a reducer what a whole picture shows",
                build=vision,
            ),
            Phase(
                settings=PhaseSettings(
                    name="language",
                    num_steps=settings.language_steps,
                    stage=Stage(name="language", rules=(Rule(part="", rate=settings.language_rate),)),
                ),
                purpose="a language model learns to answer questions about described scenes",
                build=language,
            ),
            Phase(
                settings=PhaseSettings(
                    name="stage-1", num_steps=settings.stage_1_steps, stage=Stage(name="stage-1", rules=projector_only)
                ),
                purpose="the paper's first stage: the projector alone, on captions, with all patches",
                build=stage_1,
                step_cost=0.6,
            ),
            Phase(
                settings=PhaseSettings(
                    name="alignment",
                    num_steps=settings.alignment_steps,
                    stage=Stage(name="alignment", rules=projector_only),
                ),
                purpose="projected patches come to lie where their words lie",
                build=alignment,
                step_cost=0.7,
            ),
            Phase(
                settings=PhaseSettings(
                    name="stage-2",
                    num_steps=settings.stage_2_steps,
                    stage=_stage_2(settings.rate),
                ),
                purpose="the paper's second stage: everything but the vision encoder, one token a frame",
                build=stage_2,
                step_cost=1.5,
            ),
            Phase(
                settings=PhaseSettings(
                    name="finishing", num_steps=settings.finishing_steps, stage=_stage_2(settings.finishing_rate)
                ),
                purpose="stage 2 goes on, with more clips and with pictures unlike the drawn world",
                build=finishing,
                step_cost=1.8,
            ),
        ),
    )


def parts_of(task: Task) -> tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]:
    """Return model and processor of a task of stage 2."""
    assert isinstance(task, InstructionTuning)
    return task.module.model, task.collator.processor


def _save(task: Task, folder: Path) -> None:
    for part in parts_of(task):
        part.save_pretrained(folder)


def score_tiny(
    model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor, settings: TinySettings
) -> dict[str, Score]:
    """Score a model on questions of the validation split, about ``num_validation`` in all.

    Returns:
        Scores by kind, and of all images and clips; as in ``evaluation.exact_match.scores``.
    """
    bench = Bench(world=settings.world, split="validation")
    bench = replace(bench, questions=max(settings.num_validation // len(bench.weights.kinds), 1))
    return scores(run_bench(model, processor, bench), bench.weights)


def world_tokenizer(settings: TinySettings) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows every word of the training split as one token."""
    world = WorldSettings(min_turns=6, max_turns=6, clip_share=0.3)
    items = [world_item("train", index, world, "tokenizer") for index in range(3000)]
    texts = [text for item in items for turn in item.turns for text in (turn.question, turn.answer, f" {turn.answer}")]
    texts += [text for word in WORDS for text in (word, f" {word}") for _ in range(2)]
    return build_tokenizer(texts, vocab_size=settings.config.text.vocab_size)


def _kept_tokenizer(settings: TinySettings, path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a run, kept in a file: its ids stay even if the world's words change meanwhile."""
    if not path.exists():
        with replaced(path) as draft:
            write_tokenizer(world_tokenizer(settings), draft)
    return read_tokenizer(path)


def _smoke_settings() -> TinySettings:
    config = preset("tiny")
    config = LlavaMiniConfig(
        vision_config={**config.vision.to_dict(), "num_hidden_layers": 4, "hidden_size": 96, "intermediate_size": 192},
        text_config={**config.text.to_dict(), "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192},
        prefusion_num_layers=2,
    )
    one_thing = SceneSettings(min_things=1, max_things=1, empty_share=0.0, sign_share=0.0)
    return TinySettings(
        config=config,
        world=WorldSettings(scene=one_thing, image_kinds={"colour": 1.0, "size": 1.0}, min_turns=3, max_turns=3),
        vision_scenes=SceneSettings(min_things=4, max_things=6, sign_share=0.0),
        vision_pages=(0.0, 0.0),
        vision_steps=140,
        language_steps=120,
        alignment_steps=50,
        stage_1_steps=10,
        stage_2_steps=190,
        finishing_steps=10,
        vision_batch=16,
        vision_rate=3e-3,
        language_rate=3e-3,
        rate=2e-3,
        num_validation=100,
    )


def _build(settings: TinySettings, reducer: str) -> LlavaMiniForConditionalGeneration:
    """Return a model with fresh weights. Without reduction there is no pre-fusion either, as in stage 1."""
    fields = {**settings.config.to_dict(), "reducer": reducer}
    if reducer == "identity":
        fields["prefusion_num_layers"] = 0
    return fresh_model(settings, LlavaMiniConfig.from_dict(fields))


def fresh_model(settings: TinySettings, config: LlavaMiniConfig) -> LlavaMiniForConditionalGeneration:
    """Return a model of any configuration, with weights from the seed of the settings."""
    torch.manual_seed(settings.seed)
    # On a CPU, plain attention trains faster than the fused kernel at these sizes.
    model = LlavaMiniForConditionalGeneration._from_config(config, dtype=settings.dtype, attn_implementation="eager")
    assert isinstance(model, LlavaMiniForConditionalGeneration)
    model.frames_per_pass = 4 * settings.batch
    assert model.generation_config is not None
    model.generation_config.min_new_tokens = 1  # every right answer has a word
    return model


def tuning_of(
    settings: TinySettings,
    model: LlavaMiniForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    records_of: Callable[[int], Sequence[Record]],
    *,
    thing_weight: float,
    patch_weight: float = 0.0,
    teacher: LlavaMiniForConditionalGeneration | None = None,
    conversation_every: int = 1,
) -> InstructionTuning:
    """Return the task of answering about records; what is not given here is as in ``InstructionTuning``."""
    collator = Collator(
        LlavaMiniProcessor.from_config(model.config, tokenizer, "tiny"),
        image_token_id=int(model.config.image_token_id or 0),
        tokens_per_frame=model.config.tokens_per_frame,
    )
    torch.manual_seed(settings.seed)
    return InstructionTuning(
        TunedModel(model, tells_patches=patch_weight > 0),
        collator,
        records_of,
        thing_weight=thing_weight,
        patch_weight=patch_weight,
        teacher=teacher,
        conversation_every=conversation_every,
    )


def _caption_records(settings: TinySettings, step: int) -> list[Record]:
    world = replace(settings.world, image_kinds={"caption": 1.0}, clip_share=0.0, min_turns=1, max_turns=1)
    first = step * settings.batch
    return [world_record("train", index, world, "stage-1") for index in range(first, first + settings.batch)]


def _stage_2_records(settings: TinySettings, step: int) -> list[Record]:
    """Return the records of a step of stage 2."""
    world = settings.world
    if step < settings.clip_start * settings.stage_2_steps:
        world = replace(world, clip_share=0.0)
    return asked_records(settings, world, settings.emphasis, "stage-2", step)


def _finishing_records(settings: TinySettings, step: int) -> list[Record]:
    """Return the records of a step of the last phase."""
    world = replace(settings.world, scene=replace(settings.world.scene, empty_share=settings.finishing_empty))
    if world.clip_share > 0:
        world = replace(world, clip_share=settings.finishing_clips)
    return asked_records(settings, world, settings.finishing_emphasis, "finishing", step)


def asked_records(
    settings: TinySettings, world: WorldSettings, emphasis: dict[str, float], stream: str, step: int
) -> list[Record]:
    """Return the records of a step. Descriptions are long, so they are asked for in conversations only."""
    captions = settings.conversation_every if step % settings.conversation_every == 0 else 0
    emphasis = {kind: emphasis.get(kind, 1.0) for kind in (*world.image_kinds, *world.clip_kinds)}
    emphasis |= {kind: captions * emphasis.get(kind, 1.0) for kind in CAPTION_KINDS}
    world = replace(
        world,
        image_kinds={kind: share * emphasis[kind] for kind, share in world.image_kinds.items()},
        clip_kinds={kind: share * emphasis[kind] for kind, share in world.clip_kinds.items()},
    )
    first = step * settings.batch
    records = [world_record("train", index, world, stream) for index in range(first, first + settings.batch)]
    return [
        replace(record, turns=record.turns[: settings.clip_turns]) if record.video else record for record in records
    ]


def _stage_2(rate: float) -> Stage:
    tower = r"model\.vision_tower\."
    return Stage(name="stage-2", rules=(Rule(part=tower, rate=0.0), Rule(part=f"(?!{tower})", rate=rate)))


def _vision_stage(settings: TinySettings) -> Stage:
    never_run = rf"tower\.(encoder\.layers\.{settings.config.vision.num_hidden_layers - 1}|post_layernorm)\."
    rules = Rule(part=never_run, rate=0.0), Rule(part=f"(?!{never_run})", rate=settings.vision_rate)
    return Stage(name="vision", rules=rules)


def facts_of(settings: TinySettings) -> dict[str, object]:
    """Return settings as plain values for JSON."""
    facts = {name: value for name, value in vars(settings).items() if name not in ("config", "dtype")}
    facts = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in facts.items()}
    return {**facts, "dtype": str(settings.dtype), "config": json.loads(settings.config.to_json_string(use_diff=False))}
