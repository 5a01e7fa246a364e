"""A complete training run: phases one after the other, then the model and its scores, in one folder.

Every phase resumes from its own checkpoint, so a run that was killed goes on where it was when it is
started again.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from llava_mini.evaluation.exact_match import Score, score_table
from llava_mini.recipes.record import RunRecord
from llava_mini.training.checkpoints import held, write_text
from llava_mini.training.curves import draw_curves
from llava_mini.training.devices import Hardware
from llava_mini.training.interruption import Interruption
from llava_mini.training.run_log import RunLog, Work, read_log, time_in_words
from llava_mini.training.trackers import TrackerName, open_tracker
from llava_mini.training.trainer import PhaseSettings, Task, load_weights, progress_of, train_phase
from llava_mini.training.world import World

RECORD = "run.json"
"""Name of the record of a run in its folder."""

START_SECONDS = 20.0
"""A phase is begun only if so much of a slice is left: what it needs is loaded first."""

SCORING_SECONDS = 60.0
"""The model is scored only if so much of a slice is left."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a run."""

    settings: PhaseSettings
    purpose: str
    """One sentence for the log and the docs."""
    build: Callable[[], Task]
    """Makes the task from what earlier phases left on disk."""
    step_cost: float = 1.0
    """About how long a step takes against a step of the other phases; only for the time that is left."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete training run, resumable at any moment."""

    name: str
    """Of the recipe."""
    settings: Mapping[str, object]
    """Everything that decides what comes out, as plain values for JSON. A folder is of one name and settings."""
    dtype: torch.dtype
    """Number format of the weights, for the record."""
    output_dir: Path
    phases: tuple[Phase, ...]
    save: Callable[[Task, Path], None]
    """Saves the model of the trained last task into a folder."""
    score: Callable[[Task], dict[str, Score]] | None = None
    """Scores the model of the trained last task, by kind of question. None: there is nothing to score it on."""

    @property
    def model_dir(self) -> Path:
        """Where the finished model is saved."""
        return self.output_dir / "model"

    @property
    def is_finished(self) -> bool:
        """Whether the model is saved, and scored if it can be."""
        path = self.output_dir / RECORD
        return path.exists() and bool(json.loads(path.read_text(encoding="utf-8")).get("finished"))

    def execute(
        self,
        *,
        resume: bool = True,
        hardware: Hardware | None = None,
        slice_minutes: float | None = None,
        world: World | None = None,
        tracker: TrackerName = "none",
    ) -> dict[str, Score]:
        """Run what is left of every phase, save the model, and score it.

        With several processes, all of them call this; the first one keeps the record and saves the model.

        Args:
            resume: Whether what is in the folder is gone on with. Without it, the folder must hold no run.
            hardware: Where to run; one thread of the CPU if not given.
            slice_minutes: Stop after so long, where the next call goes on. None: run to the end.
            world: The processes, and the device of this one. None: this one alone, on the device of ``hardware``.
            tracker: Where measurements go besides the log.

        On a CPU a run that was killed, interrupted or sliced ends with the same weights as one that was not, bit for
        bit. On a GPU some sums are added up in any order, so the weights agree up to rounding.

        Returns:
            Scores by kind of question; empty if the slice ended before the run did, or there are none.

        Raises:
            ValueError: If the folder holds another run or files of something else, or any run when ``resume`` is off,
                or another process trains there, or a loss is not finite.
            OSError: If a checkpoint or the model could not be written. The checkpoint before it is whole.
            KeyboardInterrupt: After Ctrl-C. What was learned is kept; the same holds for SIGTERM.
            SystemExit: After SIGTERM, with code 143.
        """
        if slice_minutes is not None and not 0 < slice_minutes < math.inf:
            raise ValueError(
                f"A slice needs a positive number of minutes, got {slice_minutes}. Leave it out to run to the end."
            )
        hardware = hardware or Hardware()
        world = world or World(device=hardware.device)
        hardware = replace(hardware, device=world.device)
        hardware.prepare()
        world.first(self._make_folder)
        work = [
            Work(name=phase.settings.name, num_steps=phase.settings.num_steps, step_cost=phase.step_cost)
            for phase in self.phases
        ]
        seconds = math.inf if slice_minutes is None else 60 * slice_minutes
        with ExitStack() as stack:
            world.first(lambda: stack.enter_context(held(self.output_dir)))
            interruption = stack.enter_context(Interruption(seconds))
            records: list[RunRecord] = []
            world.first(lambda: records.append(self._record(resume, hardware)))
            record = records[0] if records else None
            told = open_tracker(tracker, self.output_dir) if world.is_first else None
            if told is not None:
                stack.callback(told.close)
            log = RunLog(self.output_dir, phases=work, tracker=told, silent=not world.is_first)
            try:
                try:
                    return self._execute(record, log, hardware, interruption, world)
                finally:
                    self._note_progress(record)
            except (KeyboardInterrupt, SystemExit):
                log.say(f"Interrupted. {self._what_is_left(log)}")
                self._draw(log)  # last: it takes a second, and whoever stops a run may not wait for it
                raise

    def trained(self) -> Task:
        """Return the task of the finished last phase, ready to answer, on the CPU."""
        task = self.phases[-1].build()
        load_weights(task.module, self._folder(self.phases[-1]))
        task.module.eval()
        return task

    def _make_folder(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{str(self.output_dir)!r} is a file, or lies in one. Give the name of a folder."
            ) from error

    def _record(self, resume: bool, hardware: Hardware) -> RunRecord:
        record = RunRecord(self.output_dir / RECORD, self.name, self.settings, resume=resume)
        record.start(hardware, self.dtype)
        return record

    def _execute(
        self,
        record: RunRecord | None,
        log: RunLog,
        hardware: Hardware,
        interruption: Interruption,
        world: World,
    ) -> dict[str, Score]:
        fresh = True  # a slice that has only begun does something, however short it is
        for number, phase in enumerate(self.phases, start=1):
            step, seconds = world.first(lambda phase=phase: progress_of(self._folder(phase)))
            log.spent(phase.settings.name, step, seconds)
            if step == phase.settings.num_steps:
                continue
            finished = False
            if fresh or not world.first(lambda: interruption.is_due(START_SECONDS)):
                at = f", from step {step}" if step else ""
                log.say(f"phase {number} of {len(self.phases)}, {phase.settings.name}: {phase.purpose}{at}")
                finished = train_phase(
                    phase.build(),
                    phase.settings,
                    self._folder(phase),
                    log,
                    hardware=hardware,
                    interruption=interruption,
                    world=world,
                )
                fresh = False
                self._note_progress(record)
                self._draw(log)
            if not finished:
                log.say(f"The slice is over. {self._what_is_left(log)}")
                return {}
        if self.score and not fresh and world.first(lambda: interruption.is_due(SCORING_SECONDS)):
            log.say("The slice is over; the scores are left. Start the same command again to go on.")
            return {}
        return world.first(lambda: self._finish(record, log, hardware))

    def _finish(self, record: RunRecord | None, log: RunLog, hardware: Hardware) -> dict[str, Score]:
        assert record is not None, "Only the first process finishes a run."
        if self.score is None and self.is_finished and self.model_dir.exists():
            return {}
        task = self.trained()
        try:
            self.save(task, self.model_dir)
        except (OSError, SafetensorError) as error:  # the second one where the disk is full
            raise OSError(
                f"The trained model could not be saved to {self.model_dir}: {error}. The last checkpoint has all that "
                "was learned. Make room, or mend the disk, and start the same command again."
            ) from error
        if self.score is None:
            record.finish()
            return {}
        hardware.place(task.module)
        started_at = time.monotonic()
        scores = self.score(task)
        facts = {kind: asdict(score) for kind, score in scores.items()}
        write_text(self.output_dir / "scores.json", json.dumps(facts, indent=2) + "\n")
        record.phase("scoring", time.monotonic() - started_at)
        record.finish()
        log.say(score_table(scores))
        return scores

    def _folder(self, phase: Phase) -> Path:
        return self.output_dir / phase.settings.name

    def _note_progress(self, record: RunRecord | None) -> None:
        if record is None:
            return
        for phase in self.phases:
            step, seconds = progress_of(self._folder(phase))
            if step:
                record.phase(phase.settings.name, seconds)

    def _draw(self, log: RunLog) -> None:
        if log.silent:
            return
        try:
            draw_curves(read_log(log.path), self.output_dir / "curves.png")
        except (ImportError, OSError) as error:
            log.warn(f"No curves.png. {error}")

    def _what_is_left(self, log: RunLog) -> str:
        for phase in self.phases:
            step, _ = progress_of(self._folder(phase))
            if step < phase.settings.num_steps:
                return (
                    f"Step {step} of {phase.settings.num_steps} of phase {phase.settings.name} is done, about "
                    f"{time_in_words(log.seconds_left())} are left. Start the same command again to go on."
                )
        return "The scores are left. Start the same command again to go on."
