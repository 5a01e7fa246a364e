"""The study: models of one table, trained side by side on the drawn world.

All rows begin where the tiny recipe has got to after its first four phases, see the same data at the same step, and
train for as many steps at the same rates. A row is a ``Run`` of one phase, stage 2, for each seed, which decides what
starts at random and which data is drawn.

    start/                     the tiny recipe up to alignment, once
    features/seed-0/           what the frozen vision tower says of the frames of each step, as long as rows need it
    rows/<row>/seed-<n>/       a run: log, curves, checkpoint, scores, model, and facts.json
    study.json                 all scores and facts
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, cast

from torch import nn

from llava_mini.config import LlavaMiniConfig
from llava_mini.data.records import Record
from llava_mini.data.synthetic.scenes import CANVAS
from llava_mini.data.synthetic.world import WorldSettings
from llava_mini.data.tokenizer import read_tokenizer
from llava_mini.evaluation.bench import Bench, run_bench
from llava_mini.evaluation.exact_match import CAPTION_KINDS, Score, scores
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.recipes.record import RunRecord
from llava_mini.recipes.run import RECORD, START_SECONDS, Phase, Run
from llava_mini.recipes.study_features import RowTuning, features_folder
from llava_mini.recipes.study_results import FACTS, row_facts, study_table, write_study
from llava_mini.recipes.study_results import read_study as read_study
from llava_mini.recipes.study_rows import BASE, TIME_KINDS, Row, rows_of, with_needed
from llava_mini.recipes.tiny import (
    TinySettings,
    asked_records,
    fresh_model,
    parts_of,
    tiny_run,
    tiny_settings,
    tuning_of,
)
from llava_mini.training.checkpoints import FolderInUseError, held, write_text
from llava_mini.training.devices import Hardware
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import PhaseSettings, Task, load_weights
from llava_mini.training.vision_pretraining import VisionPretraining

PHASE = "stage-2"
Parts = tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]
"""A model and its processor."""
START_PHASES = 4
"""Phases of the tiny recipe that come before stage 2."""
SMOKE_ROWS = ("all-tokens", "query-prefusion-1")
LOG_EVERY = 50
"""Steps that a point of the curves is the mean of."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What is the same for all rows."""

    start: TinySettings
    """The tiny recipe; its batch, rate, emphasis and questions about a clip hold for the rows, too."""
    steps: int = 1500
    clip_share: float = 0.33
    """Share of records about clips, from the first step on."""
    questions: int = 100
    """Of each kind about images that are scored at the end; half as many of each kind about clips."""
    carrier_questions: int = 50
    """The same for what tokens and text carry."""
    time_questions: int = 4
    """Times as many are asked of each kind where a row is about time alone."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"A row trains for at least 1 step, got {self.steps}.")

    @property
    def world(self) -> WorldSettings:
        """What is asked: no descriptions, which take long and are marked otherwise."""
        world = self.start.world
        images, clips = (
            {kind: weight for kind, weight in kinds.items() if kind not in CAPTION_KINDS}
            for kinds in (world.image_kinds, world.clip_kinds)
        )
        return replace(world, image_kinds=images, clip_kinds=clips, clip_share=self.clip_share)

    def world_of(self, row: Row) -> WorldSettings:
        """Return what a row is asked, with pictures as large as it sees them."""
        world = replace(self.world, side=CANVAS * int(row.changes.get("resolution_ratio", 1)))
        if not row.about_time:
            return world
        return replace(world, image_kinds={}, clip_kinds=dict.fromkeys(TIME_KINDS, 1.0), clip_share=1.0)

    def steps_of(self, row: Row) -> int:
        """Return for how many steps a row trains: half as many where it goes on from another."""
        return -(-self.steps // 2) if row.goes_on_from else self.steps

    def bench(self, row: Row, questions: int) -> Bench:
        """Return the questions that a row is scored on, all of the validation split."""
        times = self.time_questions if row.about_time else 1
        return Bench(world=self.world_of(row), split="validation", questions=times * questions)


def study_settings(*, smoke: bool = False, steps: int | None = None) -> StudySettings:
    """Return the settings of a study, or of one that only shows that everything works.

    Args:
        smoke: The tiny recipe's smoke settings, and few steps.
        steps: Of each row; its own number when not given.
    """
    start = tiny_settings(smoke=smoke)
    if smoke:
        start = replace(start, world=replace(start.world, clip_kinds={"clip colour": 1.0}))
        settings = StudySettings(start=start, steps=30, questions=10, carrier_questions=6)
    else:
        settings = StudySettings(start=start)
    return settings if steps is None else replace(settings, steps=steps)


def train_study(
    output_dir: Path,
    settings: StudySettings,
    *,
    rows: Sequence[str] = (),
    num_seeds: int = 3,
    hardware: Hardware | None = None,
    slice_minutes: float | None = None,
    say: Callable[[str], object] = print,
) -> bool:
    """Train what is left of a study: the start, then all rows with seed 0, with seed 1, and so on.

    Several processes may do so at once in the same folder: each takes rows that no other is at.

    Args:
        output_dir: Folder of the study.
        settings: What is the same for all rows.
        rows: Names of rows, which are trained with those that they need; all of them when not given.
        num_seeds: How many times each row is trained.
        hardware: Where to train; one thread of the CPU if not given.
        slice_minutes: Stop after so long, where the next call goes on. None: run to the end.
        say: Is given the table whenever a row is finished.

    Returns:
        Whether all is done.

    Raises:
        ValueError: A row is unknown, a number is not positive, or the folder holds another run, or one with other
            settings.
    """
    if num_seeds < 1:
        raise ValueError(f"A study needs at least one seed, got {num_seeds}.")
    if slice_minutes is not None and not 0 < slice_minutes < math.inf:
        raise ValueError(
            f"A slice needs a positive number of minutes, got {slice_minutes}. Leave it out to run to the end."
        )
    chosen, hardware = with_needed(rows_of(tuple(rows))), hardware or Hardware()
    if (output_dir / RECORD).exists():
        raise ValueError(f"{str(output_dir)!r} holds another run. Give the study a folder of its own.")
    _check_start(start_run(settings, output_dir))
    for row in rows_of():
        for seed in range(num_seeds):
            _check_settings(row_run(settings, output_dir, row, seed))
    clock = _Slice(math.inf if slice_minutes is None else 60 * slice_minutes)
    start = start_run(settings, output_dir)
    if not start.is_finished:
        start.execute(hardware=hardware, slice_minutes=clock.minutes_left())
        clock.is_fresh = False
        if not start.is_finished:
            return False
    hardware.prepare()
    keeps = hardware.device.type == "cpu"  # a GPU makes features faster than a disk gives them
    for seed in range(num_seeds):
        for row in chosen:
            run = row_run(settings, output_dir, row, seed, keep_features=keeps)
            if is_done(run):
                continue
            before = needed_runs(settings, output_dir, row, seed)
            if missing := [name for name, needed in before.items() if not needed.is_finished]:
                say(f"{row.name} needs the trained {missing[0]} with seed {seed}, which is not there yet.")
                continue
            try:
                if row.weights_of:
                    is_over = not _finish_untrained(run, before[row.weights_of], settings, row, seed, hardware, clock)
                else:
                    is_over = not _finish(run, settings, row, seed, hardware, clock)
            except FolderInUseError:
                say(f"Another process trains {row.name} with seed {seed}.")
                continue
            if is_over:
                return False
            say(f"{row.name}, seed {seed}, is done.\n{study_table(write_study(output_dir))}")
        if all(_is_free(folder) for folder in output_dir.glob(f"rows/*/seed-{seed}")):
            rmtree(features_folder(output_dir, seed), ignore_errors=True)
    return all(is_done(row_run(settings, output_dir, row, seed)) for row in chosen for seed in range(num_seeds))


def start_run(settings: StudySettings, output_dir: Path) -> Run:
    """Return the run of the tiny recipe's phases before stage 2; its model has all patches and no pre-fusion."""
    folder = output_dir / "start"
    whole = tiny_run(settings.start, folder)

    def save(task: Task, model_dir: Path) -> None:
        model, tokenizer = task.module, read_tokenizer(folder / "tokenizer.json")
        assert isinstance(model, LlavaMiniForConditionalGeneration)
        model.save_pretrained(model_dir)
        LlavaMiniProcessor.from_config(model.config, tokenizer, "tiny").save_pretrained(model_dir)

    return replace(whole, name="study start", phases=whole.phases[:START_PHASES], save=save, score=None)


def row_run(settings: StudySettings, output_dir: Path, row: Row, seed: int, *, keep_features: bool = False) -> Run:
    """Return the run of one row with one seed.

    Args:
        settings: What is the same for all rows.
        output_dir: Folder of the study; its start is finished when the run begins.
        row: What is trained.
        seed: Decides the weights that start at random, and the data.
        keep_features: Whether to store what the vision tower says of the frames of each step, for the other rows.
    """
    folder = output_dir / "rows" / row.name / f"seed-{seed}"
    world, start = settings.world_of(row), settings.start
    frozen = r"model\.vision_tower\." + (r"|thing_heads\." if row.thing_weight == 0 else "")
    rules = Rule(part=frozen, rate=0.0), Rule(part=f"(?!{frozen})", rate=start.rate)
    stage = Stage(name=PHASE, rules=rules)
    is_shared = keep_features and world.side == CANVAS
    return Run(
        name="study row",
        settings=_facts(settings, row, seed),
        dtype=start.dtype,
        output_dir=folder,
        save=lambda task, folder: _save(scored_parts(task, row), folder),
        score=lambda task: _scored(scored_parts(task, row), settings.bench(row, settings.questions)),
        phases=(
            Phase(
                settings=PhaseSettings(name=PHASE, num_steps=settings.steps_of(row), stage=stage, log_every=LOG_EVERY),
                purpose=row.shows,
                build=lambda: row_task(
                    settings,
                    output_dir,
                    row,
                    seed,
                    features=features_folder(output_dir, seed) if is_shared else None,
                ),
            ),
        ),
    )


def needed_runs(settings: StudySettings, output_dir: Path, row: Row, seed: int) -> dict[str, Run]:
    """Return the runs that have to be finished before a row, by the names of their rows."""
    return {name: row_run(settings, output_dir, rows_of((name,))[0], seed) for name in row.needs}


def row_task(
    settings: StudySettings, output_dir: Path, row: Row, seed: int, *, features: Path | None = None
) -> RowTuning:
    """Return the task of a row before its first step.

    Args:
        settings: What is the same for all rows.
        output_dir: Folder of the study; its start is finished.
        row: What is trained.
        seed: As in ``row_run``.
        features: Where the features of frames are stored and read. None: they are not.
    """
    start_dir = output_dir / "start"
    before = LlavaMiniForConditionalGeneration.from_pretrained(start_dir / "model")
    start = replace(settings.start, seed=seed)
    model = fresh_model(start, row.config(start.config))
    model.vision_tower.load_state_dict(before.vision_tower.state_dict())
    if not model.reducer.has_linear_projector:  # which has nothing to start from
        model.projector.load_state_dict(before.projector.state_dict())
    load_language_model(model.language_model, before.language_model)
    if row.reducer_start == "vision":
        encoder = cast(VisionPretraining, tiny_run(settings.start, start_dir).phases[0].build())
        load_weights(encoder.module, start_dir / "vision")
        model.reducer.load_state_dict(encoder.module.reducer.state_dict())
    if model.prefusion is not None and row.prefusion_start == "language_model":
        model.prefusion.copy_from(before.language_model.model.layers)
    needed = needed_runs(settings, output_dir, row, seed)
    if row.goes_on_from:
        model.load_state_dict(_saved_parts(needed[row.goes_on_from])[0].state_dict())
    task = tuning_of(
        start,
        model,
        read_tokenizer(start_dir / "tokenizer.json"),
        partial(row_records, settings, row, seed),
        thing_weight=row.thing_weight,
        patch_weight=row.patch_weight,
        teacher=_saved_parts(needed[row.taught_by])[0] if row.taught_by else None,
        conversation_every=0,
    )
    return RowTuning(task, None if model.reducer.reads else features)  # which see more of the tower


def _saved_parts(run: Run) -> Parts:
    """Model and processor of a row that is trained, the model in evaluation mode."""
    kernel = {"dtype": run.dtype, "attn_implementation": "eager"}  # as it was trained
    model = LlavaMiniForConditionalGeneration.from_pretrained(run.model_dir, **kernel)
    return model, LlavaMiniProcessor.from_pretrained(run.model_dir)


def row_records(settings: StudySettings, row: Row, seed: int, step: int) -> list[Record]:
    """Return the records of a step: the same questions about the same scenes for all rows with a seed."""
    start = settings.start
    return asked_records(start, settings.world_of(row), start.emphasis, f"study {seed}", step)


def load_language_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy a language model into one that may be deeper, whose further layers come first, as copies of the first."""
    layers, others = ours.get_submodule("model.layers"), theirs.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    assert isinstance(others, nn.ModuleList)
    extra = len(layers) - len(others)
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("model.layers.")}
    for place, source in enumerate([*(index % len(others) for index in range(extra)), *range(len(others))]):
        copied = others[source].state_dict()
        state |= {f"model.layers.{place}.{name}": value for name, value in copied.items()}
    ours.load_state_dict(state)


def _facts(settings: StudySettings, row: Row, seed: int) -> dict[str, object]:
    """Return what decides what comes out of a row. What has its default is left out: later versions may have more."""
    start = settings.start
    values = {part.name: getattr(row, part.name) for part in fields(Row)}
    given = {part.name: values[part.name] for part in fields(Row) if values[part.name] not in (part.default, {})}
    return {
        "row": {name: value for name, value in given.items() if name != "shows"} | {"changes": {**BASE, **row.changes}},
        "seed": seed,
        "steps": settings.steps_of(row),
        "questions": settings.questions,
        "batch": start.batch,
        "rate": start.rate,
        "clip_turns": start.clip_turns,
        "emphasis": start.emphasis,
        "world": asdict(settings.world_of(row)),
        "dtype": str(start.dtype),
    }


def _check_settings(run: Run) -> None:
    """Refuse a folder of another study.

    Raises:
        ValueError: What is there of a run has other settings.
    """
    path = run.output_dir / RECORD
    if path.exists():
        RunRecord(path, run.name, run.settings, resume=True)


def _check_start(run: Run) -> None:
    """Refuse the start of another study. Its configuration does not count: later versions may have more fields.

    Raises:
        ValueError: It was trained with other settings.
    """
    path = run.output_dir / RECORD
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8")).get("settings", {}).get("config")
        _check_settings(replace(run, settings={**run.settings, "config": found}))


def is_done(run: Run) -> bool:
    """Return whether a row with a seed is trained, scored and looked into."""
    return run.is_finished and (run.output_dir / FACTS).exists()


class _Slice:
    """The time that a call may take."""

    def __init__(self, seconds: float) -> None:
        self.ends_at = time.monotonic() + seconds
        self.is_fresh = True
        """Nothing is done yet: then something is done, however short the slice."""

    def minutes_left(self) -> float | None:
        """Time for a run; None: as much as it takes."""
        left = (self.ends_at - time.monotonic()) / 60
        return None if math.isinf(left) else max(left, 1e-6)

    def is_over(self, needed_seconds: float) -> bool:
        return not self.is_fresh and time.monotonic() + needed_seconds > self.ends_at


def _finish(run: Run, settings: StudySettings, row: Row, seed: int, hardware: Hardware, clock: _Slice) -> bool:
    """Do what is left of a row with a seed; False if the slice ended before."""
    if not run.is_finished:
        if clock.is_over(START_SECONDS):
            return False
        run.execute(hardware=hardware, slice_minutes=clock.minutes_left())
        clock.is_fresh = False
        if not run.is_finished:
            return False
    if clock.is_over(_seconds_for_facts(run, settings)):
        return False
    with held(run.output_dir):
        parts = _saved_parts(run)
        hardware.place(parts[0])
        _look_into(parts, settings, row, seed, run.output_dir)
    clock.is_fresh = False
    return True


def _look_into(parts: Parts, settings: StudySettings, row: Row, seed: int, folder: Path) -> None:
    """Write the facts of a model that is trained and scored."""
    facts = row_facts(row, seed, *parts, folder=folder, bench=settings.bench(row, settings.carrier_questions))
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def _finish_untrained(
    run: Run, source: Run, settings: StudySettings, row: Row, seed: int, hardware: Hardware, clock: _Slice
) -> bool:
    """Score a method without training in the model of another row; False if the slice ended before."""
    if clock.is_over(_seconds_for_facts(source, settings)):
        return False
    run.output_dir.mkdir(parents=True, exist_ok=True)
    with held(run.output_dir):
        record = RunRecord(run.output_dir / RECORD, run.name, run.settings, resume=True)
        record.start(hardware, run.dtype)
        parts = with_fields(*_saved_parts(source), row.changes)
        hardware.place(parts[0])
        found = {kind: asdict(score) for kind, score in _scored(parts, settings.bench(row, settings.questions)).items()}
        write_text(run.output_dir / "scores.json", json.dumps(found, indent=2) + "\n")
        _look_into(parts, settings, row, seed, run.output_dir)
        record.finish()
    clock.is_fresh = False
    return True


def scored_parts(task: Task, row: Row) -> Parts:
    """Return model and processor of a trained row, with what its configuration says after training."""
    return with_fields(*parts_of(task), row.scored) if row.scored else parts_of(task)


def with_fields(
    model: LlavaMiniForConditionalGeneration, processor: LlavaMiniProcessor, changes: Mapping[str, Any]
) -> Parts:
    """Return a model with the same weights and another configuration, and its processor."""
    config = LlavaMiniConfig.from_dict({**model.config.to_dict(), **changes})
    kernel = model.config._attn_implementation
    other = LlavaMiniForConditionalGeneration._from_config(config, dtype=model.dtype, attn_implementation=kernel)
    assert isinstance(other, LlavaMiniForConditionalGeneration)
    other.load_state_dict(model.state_dict())
    other.generation_config, other.frames_per_pass = model.generation_config, model.frames_per_pass
    return other.eval(), LlavaMiniProcessor.from_config(config, processor.tokenizer, "tiny")


def _seconds_for_facts(run: Run, settings: StudySettings) -> float:
    """About how long it takes to ask all questions in up to six ways."""
    seconds = json.loads((run.output_dir / RECORD).read_text(encoding="utf-8"))["seconds"].get("scoring", 0.0)
    return 10.0 + 6 * seconds * settings.carrier_questions / settings.questions


def _is_free(folder: Path) -> bool:
    """Whether no other process trains in a folder."""
    try:
        with held(folder):
            return True
    except FolderInUseError:
        return False


def _save(parts: Parts, folder: Path) -> None:
    for part in parts:
        part.save_pretrained(folder)


def _scored(parts: Parts, bench: Bench) -> dict[str, Score]:
    return scores(run_bench(*parts, bench), bench.weights)
