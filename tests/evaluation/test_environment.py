import subprocess

import torch

from llava_mini.evaluation import environment as module


def test_looking_for_the_commit_takes_no_lock_that_a_kill_could_leave(monkeypatch):
    asked, run = [], subprocess.run

    def recorded(command, **named):
        asked.append(command)
        return run(command, **named)

    monkeypatch.setattr(module.subprocess, "run", recorded)
    found = module.environment(torch.device("cpu"), torch.float32)
    assert isinstance(found["commit"], str)
    assert asked
    assert all(command[:2] == ["git", "--no-optional-locks"] for command in asked)
