import sys
from types import SimpleNamespace

import pytest

from llava_mini.training.run_log import RunLog, read_log
from llava_mini.training.trackers import numbers_of, open_tracker


class Recorded:
    """Stands in for TensorBoard's writer and for wandb."""

    def __init__(self, *arguments, **named):
        self.made, self.named = arguments, named
        self.lines = []
        self.is_closed = False

    def add_scalar(self, name, value, step):
        self.lines.append((name, value, step))

    def log(self, values):
        self.lines.append(values)

    def flush(self):
        pass

    def close(self):
        self.is_closed = True

    finish = close


def test_no_tracker_is_none_and_an_unknown_one_lists_the_known(tmp_path):
    assert open_tracker("none", tmp_path) is None
    with pytest.raises(ValueError, match="no tracker 'mlflow'; choose one of none, tensorboard, wandb"):
        open_tracker("mlflow", tmp_path)


def test_numbers_are_named_by_phase_and_group():
    line = {"phase": "stage-2", "step": 3, "loss": 2, "right": {"tokens": 0.5}}
    assert numbers_of(line) == {"stage-2/loss": 2.0, "stage-2/right/tokens": 0.5}


def test_a_log_tells_tensorboard_what_it_writes(tmp_path, monkeypatch):
    module = SimpleNamespace(SummaryWriter=Recorded)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(writer=module))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", module)
    tracker = open_tracker("tensorboard", tmp_path)
    RunLog(tmp_path, tracker=tracker).write(phase="stage-2", step=3, loss=2.0)
    assert tracker._writer.made == (str(tmp_path / "tensorboard"),)
    assert tracker._writer.lines == [("stage-2/loss", 2.0, 3)]
    tracker.close()
    assert tracker._writer.is_closed


def test_a_run_that_goes_on_is_the_same_run_of_wandb_and_one_elsewhere_is_another(tmp_path, monkeypatch):
    made = []

    def init(**named):
        made.append(Recorded(**named))
        return made[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folders = [tmp_path / "a" / "finetune", tmp_path / "b" / "finetune"]
    for folder in (folders[0], *folders):
        folder.mkdir(parents=True, exist_ok=True)
        tracker = open_tracker("wandb", folder)
        tracker.write({"phase": "stage-2", "step": 3, "loss": 2.0})
        tracker.close()
    assert made[0].named["id"] == made[1].named["id"] != made[2].named["id"]
    assert {one.named["name"] for one in made} == {"finetune"}
    assert made[0].lines == [{"stage-2/loss": 2.0, "stage-2/step": 3}]
    assert made[0].is_closed


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")])
def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"is not installed: pip install 'llava-mini\[{name}\]'"):
        open_tracker(name, tmp_path)


def test_a_silent_log_leaves_nothing(tmp_path):
    log = RunLog(tmp_path / "run", silent=True)
    log.write(phase="a", step=1)
    log.say("hello")
    assert not (tmp_path / "run").exists()
    assert read_log(log.path) == []
