"""The tiny recipe away from its home: batches in other processes, a machine with few packages."""

import os
import pickle
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch

import llava_mini
from llava_mini.recipes.tiny import tiny_run, tiny_settings
from llava_mini.training.trainer import progress_of


def short_settings():
    """A step of each phase, and two of the last: one with a conversation, one without, both with clips."""
    settings = tiny_settings(smoke=True)
    steps = {f"{name}_steps": 1 for name in ("vision", "language", "alignment", "stage_1")}
    sizes = {"vision_batch": 2, "language_batch": 2, "batch": 2, "num_validation": 1}
    world = replace(settings.world, clip_share=0.5)
    return replace(settings, **steps, **sizes, stage_2_steps=2, clip_start=0.0, world=world)


def tensors(value):
    """All tensors in a batch, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, list | tuple) else []


def test_a_run_needs_no_packages_beyond_those_of_training_and_its_batches_can_be_made_elsewhere(tmp_path):
    program = (
        "import sys\n"
        "for name in ('av', 'tyro', 'matplotlib', 'torchvision', 'torchao'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from tests.recipes.test_tiny_anywhere import short_settings, tiny_run\n"
        "assert tiny_run(short_settings(), Path(sys.argv[1])).execute()\n"
    )
    paths = [str(Path(__file__).parents[2]), str(Path(llava_mini.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: No curves.png" in done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()

    phases = tiny_run(short_settings(), tmp_path).phases
    assert len(phases) == 6
    for phase in phases:
        name = phase.settings.name
        assert progress_of(tmp_path / name)[0] == phase.settings.num_steps
        task = phase.build()
        message = pickle.dumps(task.make_batch)
        here, elsewhere = tensors(task.make_batch(0)), tensors(pickle.loads(message)(0))
        assert len(here) >= 2, name
        assert all(torch.equal(one, other) for one, other in zip(here, elsewhere, strict=True)), name
        weights = sum(value.numel() * value.element_size() for value in task.module.state_dict().values())
        assert len(message) < weights / 2, f"the batches of {name} carry the model along"
