import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch import nn

from llava_mini.training.checkpoints import read_checkpoint, write_checkpoint
from llava_mini.training.devices import Hardware
from llava_mini.training.interruption import Interruption
from llava_mini.training.run_log import RunLog, read_log
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import Losses, PhaseSettings, load_weights, progress_of, train_phase

STAGE = Stage(name="all", rules=(Rule(part="", rate=1e-2),))
HALF = Stage(name="half", rules=(Rule(part="0", rate=0.0), Rule(part="2", rate=1e-2)))


def draw(poisoned_step, step):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
    return x * float("nan") if step == poisoned_step else x


class Line:
    """Learns to halve its input. Batches depend on the step alone; dropout uses torch's random numbers."""

    def __init__(self, poisoned_step=-1):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3)).to(torch.bfloat16)

        self.make_batch = partial(draw, poisoned_step)

    def losses(self, x):
        loss = (self.module(x) - x / 2).float().square().mean()
        return Losses(
            total=loss,
            parts={"double": 2 * float(loss.detach())},
            right={"half": 0.5},
        )


def settings(**fields):
    return PhaseSettings(
        **{"name": "line", "num_steps": 40, "stage": STAGE, "checkpoint_seconds": 0, "log_every": 10, **fields}
    )


def quiet(folder, tmp_path):
    return RunLog(folder, terminal=(tmp_path / "terminal").open("a"))


def measured(folder):
    """The log without its times."""
    return [{**line, "time": 0, "seconds": 0} for line in read_log(folder / "log.jsonl")]


def weights(task):
    return torch.cat([parameter.detach().flatten() for parameter in task.module.parameters()])


def test_the_loss_falls_and_is_logged(tmp_path):
    train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[0]["double"] == pytest.approx(2 * lines[0]["loss"])
    assert lines[0]["right"] == {"half": 0.5}


@pytest.mark.parametrize("killed_at", [1, 17, 39])
def test_a_killed_run_goes_on_exactly_as_it_would_have(tmp_path, killed_at):
    whole = Line()
    train_phase(whole, settings(), tmp_path / "whole", quiet(tmp_path, tmp_path))
    train_phase(Line(), settings(), tmp_path / "parts", quiet(tmp_path, tmp_path), stop_after=killed_at)
    resumed = Line()
    torch.manual_seed(99)
    train_phase(resumed, settings(), tmp_path / "parts", quiet(tmp_path, tmp_path))
    assert torch.equal(weights(whole), weights(resumed))
    assert measured(tmp_path / "whole") == measured(tmp_path / "parts")


def test_steps_after_the_last_checkpoint_are_run_again(tmp_path):
    rare = settings(checkpoint_seconds=1e6)
    whole = Line()
    train_phase(whole, rare, tmp_path / "whole", quiet(tmp_path, tmp_path))
    train_phase(Line(), rare, tmp_path / "parts", quiet(tmp_path, tmp_path), stop_after=17)
    assert progress_of(tmp_path / "parts")[0] == 0
    resumed = Line()
    train_phase(resumed, rare, tmp_path / "parts", quiet(tmp_path, tmp_path))
    assert torch.equal(weights(whole), weights(resumed))


def test_a_finished_phase_is_known_and_its_weights_can_be_loaded(tmp_path):
    task, other = Line(), Line()
    train_phase(task, settings(), tmp_path, quiet(tmp_path, tmp_path))
    steps, seconds = progress_of(tmp_path)
    assert steps == 40
    assert seconds > 0
    load_weights(other.module, tmp_path)
    assert torch.equal(weights(task), weights(other))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(ValueError, match="loss of phase 'line' is nan at step 7"):
        train_phase(Line(poisoned_step=7), settings(), tmp_path, quiet(tmp_path, tmp_path))
    assert read_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 7


@pytest.mark.parametrize("wrong", [lambda total: total * 0, lambda total: total + torch.nan], ids=["zero", "nan"])
def test_a_loss_that_cannot_be_changes_no_weight(tmp_path, wrong):
    class Wrong(Line):
        def losses(self, x):
            found = super().losses(x)
            return replace(found, total=wrong(found.total)) if torch.equal(x, self.make_batch(7)) else found

    task, before = Wrong(), Line()
    with pytest.raises(ValueError, match="at step 7"):
        train_phase(task, settings(), tmp_path, quiet(tmp_path, tmp_path))
    load_weights(before.module, tmp_path)
    assert torch.equal(weights(task), weights(before))


def test_the_checkpoint_of_another_stage_is_refused(tmp_path):
    train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path))
    with pytest.raises(ValueError, match=r"other tensors than this stage has, for example module\.0\.bias"):
        train_phase(Line(), settings(stage=HALF), tmp_path, quiet(tmp_path, tmp_path))


def test_the_checkpoint_of_another_phase_is_refused(tmp_path):
    train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="'num_steps': 40"):
        train_phase(Line(), settings(num_steps=50), tmp_path, quiet(tmp_path, tmp_path))


def stored_names(folder):
    [path] = folder.glob("**/*.safetensors")
    with safe_open(path, framework="pt") as file:
        return {name.partition(".")[2] for name in file.keys() if not name.startswith("random.")}  # noqa: SIM118


@pytest.mark.parametrize("keep_last", [None, 1], ids=["file", "folders"])
def test_what_is_frozen_is_not_stored_and_what_trains_goes_on(tmp_path, keep_last):
    half, whole = settings(stage=HALF, keep_last=keep_last), Line()
    train_phase(whole, half, tmp_path / "whole", quiet(tmp_path, tmp_path))
    train_phase(Line(), half, tmp_path / "parts", quiet(tmp_path, tmp_path), stop_after=17)
    resumed, loaded = Line(), Line()
    train_phase(resumed, half, tmp_path / "parts", quiet(tmp_path, tmp_path))
    load_weights(loaded.module, tmp_path / "parts")
    for other in (resumed, loaded):
        assert torch.equal(weights(whole), weights(other))
    trained = {"2.weight", "2.bias"}
    moments = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in trained}
    assert stored_names(tmp_path / "parts") == trained | moments


@pytest.mark.parametrize("keep_last", [None, 1], ids=["file", "folders"])
def test_other_frozen_weights_than_those_of_the_run_are_refused(tmp_path, keep_last):
    half, other = settings(stage=HALF, keep_last=keep_last), Line()
    train_phase(Line(), half, tmp_path, quiet(tmp_path, tmp_path), stop_after=2)
    with torch.no_grad():
        other.module[0].bias[3] += 1e-2
    told = "beside other frozen weights than those that are here, in 0. Was the model replaced"
    with pytest.raises(ValueError, match=told):
        train_phase(other, half, tmp_path, quiet(tmp_path, tmp_path))
    with pytest.raises(ValueError, match=told):
        load_weights(other.module, tmp_path)


def test_buffers_go_on_as_what_trains_does(tmp_path):
    def counting():
        task = Line()
        task.module.append(nn.BatchNorm1d(3, dtype=torch.bfloat16))
        return task

    stage = Stage(name="all", rules=(Rule(part="[03]", rate=0.0), Rule(part="2", rate=1e-2)))
    whole, resumed = counting(), counting()
    train_phase(whole, settings(stage=stage), tmp_path / "whole", quiet(tmp_path, tmp_path))
    train_phase(counting(), settings(stage=stage), tmp_path / "parts", quiet(tmp_path, tmp_path), stop_after=17)
    train_phase(resumed, settings(stage=stage), tmp_path / "parts", quiet(tmp_path, tmp_path))
    expected, found = whole.module.state_dict(), resumed.module.state_dict()
    assert expected["3.num_batches_tracked"] == 40
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_checkpoint_of_an_earlier_version_is_refused_as_such(tmp_path):
    train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path), stop_after=2)
    path = tmp_path / "checkpoint.safetensors"
    tensors, facts = read_checkpoint(path)
    write_checkpoint(path, tensors, {name: value for name, value in facts.items() if name != "frozen"})
    with pytest.raises(ValueError, match="written by an earlier version.* Finish the run with that version"):
        train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="written by an earlier version"):
        load_weights(Line().module, tmp_path)


def test_a_phase_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        settings(num_steps=0)


def test_processes_that_make_batches_change_nothing(tmp_path):
    alone = Line()
    train_phase(alone, settings(), tmp_path / "alone", quiet(tmp_path, tmp_path))
    helped, hardware = Line(), Hardware(workers=2)
    assert train_phase(helped, settings(), tmp_path / "helped", quiet(tmp_path, tmp_path), hardware=hardware)
    assert torch.equal(weights(alone), weights(helped))


def test_a_phase_whose_time_is_up_ends_with_a_checkpoint_and_makes_at_least_a_step(tmp_path):
    whole, parts = Line(), Line()
    rare = settings(num_steps=4, checkpoint_seconds=1e6)
    train_phase(whole, rare, tmp_path / "whole", quiet(tmp_path, tmp_path))
    ends = []
    for _ in range(4):
        parts = Line()
        log = quiet(tmp_path, tmp_path)
        ends.append(train_phase(parts, rare, tmp_path / "parts", log, interruption=Interruption(seconds=0)))
    assert ends == [False, False, False, True]
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, number, error):
    class Interrupted(Line):
        def losses(self, x):
            if progress_of(tmp_path) == (0, 0) and torch.equal(x, self.make_batch(5)):
                os.kill(os.getpid(), number)
            return super().losses(x)

    rare = settings(checkpoint_seconds=1e6)
    with Interruption() as interruption, pytest.raises(error):
        train_phase(Interrupted(), rare, tmp_path, quiet(tmp_path, tmp_path), interruption=interruption)
    assert progress_of(tmp_path)[0] == 6
