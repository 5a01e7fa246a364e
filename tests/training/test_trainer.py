import pytest
import torch
from torch import nn

from llava_mini.training.checkpoints import read_checkpoint
from llava_mini.training.run_log import RunLog, read_log
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import Losses, PhaseSettings, is_finished, load_weights, train_phase

STAGE = Stage(name="all", rules=(Rule(part="", rate=1e-2),))


class Line:
    """Learns to halve its input. Batches depend on the step alone; dropout uses torch's random numbers."""

    def __init__(self, poisoned_step=-1):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3)).to(torch.bfloat16)
        self.poisoned_step = poisoned_step

    def make_batch(self, step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        return x * float("nan") if step == self.poisoned_step else x

    def losses(self, x):
        loss = (self.module(x) - x / 2).float().square().mean()
        return Losses(
            total=loss,
            parts={"double": 2 * float(loss.detach())},
        )


def settings(**fields):
    return PhaseSettings(
        **{"name": "line", "num_steps": 40, "stage": STAGE, "checkpoint_seconds": 0, "log_every": 10, **fields}
    )


def quiet(folder, tmp_path):
    return RunLog(folder, terminal=(tmp_path / "terminal").open("a"))


def weights(task):
    return torch.cat([parameter.detach().flatten() for parameter in task.module.parameters()])


def test_the_loss_falls_and_is_logged(tmp_path):
    train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[0]["double"] == pytest.approx(2 * lines[0]["loss"])


@pytest.mark.parametrize("killed_at", [1, 17, 39])
def test_a_killed_run_goes_on_exactly_as_it_would_have(tmp_path, killed_at):
    whole = Line()
    train_phase(whole, settings(), tmp_path / "whole", quiet(tmp_path, tmp_path))
    train_phase(Line(), settings(), tmp_path / "parts", quiet(tmp_path, tmp_path), stop_after=killed_at)
    resumed = Line()
    torch.manual_seed(99)
    train_phase(resumed, settings(), tmp_path / "parts", quiet(tmp_path, tmp_path))
    assert torch.equal(weights(whole), weights(resumed))


def test_steps_after_the_last_checkpoint_are_run_again(tmp_path):
    rare = settings(checkpoint_seconds=1e6)
    whole = Line()
    train_phase(whole, rare, tmp_path / "whole", quiet(tmp_path, tmp_path))
    train_phase(Line(), rare, tmp_path / "parts", quiet(tmp_path, tmp_path), stop_after=17)
    assert not is_finished(rare, tmp_path / "parts")
    resumed = Line()
    train_phase(resumed, rare, tmp_path / "parts", quiet(tmp_path, tmp_path))
    assert torch.equal(weights(whole), weights(resumed))


def test_a_finished_phase_is_known_and_its_weights_can_be_loaded(tmp_path):
    task, other = Line(), Line()
    train_phase(task, settings(), tmp_path, quiet(tmp_path, tmp_path))
    assert is_finished(settings(), tmp_path)
    load_weights(other.module, tmp_path)
    assert torch.equal(weights(task), weights(other))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(ValueError, match="loss of phase 'line' is nan at step 7"):
        train_phase(Line(poisoned_step=7), settings(), tmp_path, quiet(tmp_path, tmp_path))
    assert read_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 7


def test_the_checkpoint_of_another_phase_is_refused(tmp_path):
    train_phase(Line(), settings(), tmp_path, quiet(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="'num_steps': 40"):
        train_phase(Line(), settings(num_steps=50), tmp_path, quiet(tmp_path, tmp_path))


def test_a_phase_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        settings(num_steps=0)
