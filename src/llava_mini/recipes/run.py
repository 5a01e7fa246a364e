"""A complete training run: phases one after the other, then the model and its scores, in one folder.

Every phase resumes from its own checkpoint, so a run that was killed goes on where it was when it is
started again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_mini.evaluation.exact_match import Score, score_table
from llava_mini.training.run_log import RunLog
from llava_mini.training.trainer import PhaseSettings, Task, is_finished, load_weights, train_phase


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a run."""

    settings: PhaseSettings
    purpose: str
    """One sentence for the log and the docs."""
    build: Callable[[], Task]
    """Makes the task from what earlier phases left on disk."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete training run, resumable at any moment."""

    name: str
    """Of the recipe."""
    settings: Mapping[str, object]
    """Everything that decides what comes out, as plain values for JSON. A folder is of one name and settings."""
    output_dir: Path
    phases: tuple[Phase, ...]
    save: Callable[[Task, Path], None]
    """Saves the model of the trained last task into a folder."""
    score: Callable[[Task], dict[str, Score]]
    """Scores the model of the trained last task, by kind of question."""

    @property
    def model_dir(self) -> Path:
        """Where the finished model is saved."""
        return self.output_dir / "model"

    def execute(self, *, resume: bool = True) -> dict[str, Score]:
        """Run what is left of every phase, save the model, and score it.

        Args:
            resume: Whether checkpoints in the folder are used. Without it, the folder must hold none.

        Returns:
            Scores by kind of question.

        Raises:
            ValueError: If the folder holds another run, or any run when ``resume`` is off.
        """
        self._claim_folder(resume)
        log = RunLog(self.output_dir)
        for number, phase in enumerate(self.phases, start=1):
            folder = self.output_dir / phase.settings.name
            if is_finished(phase.settings, folder):
                continue
            log.say(f"phase {number} of {len(self.phases)}, {phase.settings.name}: {phase.purpose}")
            train_phase(phase.build(), phase.settings, folder, log)
        task = self.trained()
        self.save(task, self.model_dir)
        scores = self.score(task)
        facts = {kind: asdict(score) for kind, score in scores.items()}
        (self.output_dir / "scores.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        log.say(score_table(scores))
        return scores

    def trained(self) -> Task:
        """Return the task of the finished last phase, ready to answer."""
        task = self.phases[-1].build()
        load_weights(task.module, self.output_dir / self.phases[-1].settings.name)
        task.module.eval()
        return task

    def _claim_folder(self, resume: bool) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / "run.json"
        facts = json.loads(json.dumps({"recipe": self.name, **self.settings}))  # as they come back from a file
        if path.exists():
            if not resume:
                raise ValueError(f"{self.output_dir} already holds a run. Give an empty folder, or resume it.")
            if json.loads(path.read_text(encoding="utf-8")) != facts:
                raise ValueError(
                    f"{self.output_dir} holds a run with other settings (see run.json there). Give another folder."
                )
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
