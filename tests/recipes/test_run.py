"""A run of two small phases, in this process and in one that is killed."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import llava_mini
from llava_mini.evaluation.exact_match import Score
from llava_mini.recipes.run import Phase, Run
from llava_mini.training import checkpoints
from llava_mini.training.run_log import read_log
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import Losses, PhaseSettings, load_weights, progress_of

SCORE = Score(exact=0.5, low=0.4, high=0.6, blind=0.1, questions=9)
STAGE = Stage(name="all", rules=(Rule(part="", rate=1e-2),))
ROOT = Path(__file__).parents[2]


def draw(step):
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(step))


class Line:
    """Learns to halve its input, with dropout from torch's random numbers."""

    make_batch = staticmethod(draw)

    def __init__(self, step_seconds=0.0):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3)).to(torch.bfloat16)
        self.step_seconds = step_seconds

    def losses(self, batch):
        time.sleep(self.step_seconds)
        x = batch.to(torch.bfloat16)
        return Losses(total=(self.module(x) - x / 2).float().square().mean(), right={"half": 0.5})


def save(task, model_dir):
    model_dir.mkdir(exist_ok=True)
    torch.save(task.module.state_dict(), model_dir / "weights.pt")


def line_run(folder, num_steps=30, step_seconds=0.0, settings=None, score=lambda task: {"all": SCORE}):
    """The second phase begins with the weights of the first."""
    folder = Path(folder)

    def second():
        task = Line(step_seconds)
        load_weights(task.module, folder / "one")
        return task

    def phase(name, build):
        fields = {"name": name, "num_steps": num_steps, "stage": STAGE, "checkpoint_seconds": 0.05, "log_every": 5}
        return Phase(settings=PhaseSettings(**fields), purpose=f"learn {name}", build=build)

    return Run(
        name="line",
        settings=settings or {"steps": num_steps},
        dtype=torch.bfloat16,
        output_dir=folder,
        phases=(phase("one", partial(Line, step_seconds)), phase("two", second)),
        save=save,
        score=score,
    )


def final_weights(folder):
    return torch.cat([value.flatten() for value in torch.load(folder / "model" / "weights.pt").values()])


def record(folder):
    return json.loads((folder / "run.json").read_text())


def measured(folder):
    return [{**line, "time": 0, "seconds": 0} for line in read_log(folder / "log.jsonl")]


def child(folder, num_steps, step_seconds):
    """The same run in a process of its own, with its error output."""
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tests.recipes.test_run import line_run\n"
        f"line_run({str(folder)!r}, {num_steps}, {step_seconds}).execute()"
    )
    paths = [str(ROOT), str(Path(llava_mini.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder, step):
    deadline = time.monotonic() + 120
    while progress_of(folder)[0] < step:
        assert time.monotonic() < deadline, "the child made no progress"
        time.sleep(0.01)


def test_a_run_leaves_record_log_curves_scores_and_model(tmp_path):
    pytest.importorskip("matplotlib")
    assert line_run(tmp_path).execute() == {"all": SCORE}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.json", "log.jsonl", "curves.png", "scores.json", "model", "one", "two"}
    assert json.loads((tmp_path / "scores.json").read_text())["all"]["exact"] == 0.5
    facts = record(tmp_path)
    assert (facts["recipe"], facts["settings"]) == ("line", {"steps": 30})
    assert facts["started"] <= facts["finished"]
    assert set(facts["seconds"]) == {"one", "two", "scoring"}
    [start] = facts["starts"]
    assert start["torch"] == torch.__version__
    assert start["llava-mini"] == llava_mini.__version__
    assert start["device"].startswith("cpu")
    assert {"python", "transformers", "commit", "threads", "workers", "dtype"} <= start.keys()


def test_a_finished_run_is_scored_again_and_nothing_else(tmp_path):
    line_run(tmp_path).execute()
    before, finished = (tmp_path / "log.jsonl").read_text(), record(tmp_path)["finished"]
    assert line_run(tmp_path).execute() == {"all": SCORE}
    assert (tmp_path / "log.jsonl").read_text() == before
    assert record(tmp_path)["finished"] == finished
    assert len(record(tmp_path)["starts"]) == 2


def test_versions_may_change_between_starts_but_settings_may_not(tmp_path):
    line_run(tmp_path).execute()
    facts = record(tmp_path)
    facts["starts"][0]["torch"] = "0.1"
    (tmp_path / "run.json").write_text(json.dumps(facts))
    line_run(tmp_path).execute()
    assert [start["torch"] for start in record(tmp_path)["starts"]] == ["0.1", torch.__version__]
    with pytest.raises(ValueError, match=r"other settings .*different: rate, steps"):
        line_run(tmp_path, settings={"steps": 31, "rate": 1}).execute()
    with pytest.raises(ValueError, match="already holds a run"):
        line_run(tmp_path).execute(resume=False)


def test_slices_add_up_to_the_whole_run(tmp_path, capsys):
    line_run(tmp_path / "whole", 7).execute()
    slices = 0
    while not (scores := line_run(tmp_path / "parts", 7).execute(slice_minutes=1e-9)):
        slices += 1
        assert "Start the same command again" in capsys.readouterr().err
    assert scores == {"all": SCORE}
    assert slices == 14  # a slice that is too short for anything makes one step; scoring is a slice of its own
    assert torch.equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))
    assert measured(tmp_path / "whole") == measured(tmp_path / "parts")


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_a_slice_needs_some_time_and_an_end(tmp_path, minutes):
    with pytest.raises(ValueError, match=f"positive number of minutes, got {minutes}"):
        line_run(tmp_path).execute(slice_minutes=minutes)


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_file_is_no_folder_for_a_run(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{name}' is a file, or lies in one. Give the name of a folder"):
        line_run(tmp_path / name).execute()


@pytest.mark.parametrize("text", ["", '{"recipe": "li', "[1]", "\xff"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.json is damaged.* Restore it, or give another folder"):
        line_run(tmp_path).execute()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [text.encode("latin-1")]


@pytest.mark.parametrize("name", ["thesis.txt", "photos/one.png", "one/checkpoint.safetensors"])
def test_a_folder_with_files_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"is not empty and holds no run\.json"):
        line_run(tmp_path).execute()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_what_a_killed_start_left_is_no_obstacle(tmp_path):
    for name in (".run.json.draft", "tokenizer.json", ".tokenizer.json.draft"):
        (tmp_path / name).touch()
    (tmp_path / "one").mkdir()
    assert line_run(tmp_path).execute() == {"all": SCORE}


def test_the_record_is_read_when_no_other_start_can_add_to_it(tmp_path, monkeypatch):
    line_run(tmp_path).execute()

    @contextmanager
    def held_after_another_start(folder):
        with checkpoints.held(folder):
            facts = record(tmp_path)
            facts["starts"].append({"started": "meanwhile"})
            (tmp_path / "run.json").write_text(json.dumps(facts))
            yield

    monkeypatch.setattr("llava_mini.recipes.run.held", held_after_another_start)
    line_run(tmp_path).execute()
    starts = [start["started"] for start in record(tmp_path)["starts"]]
    assert len(starts) == 3
    assert starts[1] == "meanwhile"


def test_a_model_that_does_not_fit_on_the_disk_is_saved_by_the_next_start(tmp_path):
    def save_much(task, folder):
        folder.mkdir(exist_ok=True)
        save_file({"weights": torch.zeros(20_000)}, folder / "model.safetensors")

    run, before = replace(line_run(tmp_path), save=save_much), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"The trained model could not be saved .* start the same command again\."):
            run.execute()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not run.is_finished
    assert run.execute() == {"all": SCORE}
    assert run.is_finished


def test_curves_that_cannot_be_written_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("llava_mini.recipes.run.draw_curves", fail)
    assert line_run(tmp_path).execute()
    assert "warning: No curves.png. disk full" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tmp_path):
    line_run(tmp_path).execute()
    path = tmp_path / "two" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"two/checkpoint\.safetensors is damaged"):
        line_run(tmp_path).execute()
    path.unlink()
    assert line_run(tmp_path).execute()


def test_without_matplotlib_a_run_ends_well_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert line_run(tmp_path).execute()
    assert capsys.readouterr().err.count("warning: No curves.png") == 1


def test_a_run_that_is_killed_at_any_moment_goes_on_exactly(tmp_path):
    line_run(tmp_path / "whole", 40).execute()
    parts = tmp_path / "parts"
    for phase, step in (("one", 7), ("one", 29), ("two", 13)):
        process = child(parts, 40, 0.02)
        wait_for_step(parts / phase, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert not (parts / "model").exists()
    assert line_run(parts, 40).execute()
    assert torch.equal(final_weights(tmp_path / "whole"), final_weights(parts))
    assert measured(tmp_path / "whole") == measured(parts)
    assert len(record(parts)["starts"]) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_at_once_and_says_how_to_go_on(tmp_path, number, code):
    process = child(tmp_path, 1000, 0.02)
    wait_for_step(tmp_path / "one", 6)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Interrupted. Step " in told
    assert "Start the same command again to go on." in told
    step, seconds = progress_of(tmp_path / "one")
    assert record(tmp_path)["seconds"] == {"one": round(seconds, 1)}
    assert 6 <= step < 1000
    assert (tmp_path / "curves.png").exists() == bool(importlib.util.find_spec("matplotlib"))
