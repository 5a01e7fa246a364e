"""Stage 2 among two processes is stage 2 alone: the same steps, losses and gradients."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_mini.checkpoint.assemble import NewParts, build_model, build_processor, join_parts
from llava_mini.recipes.finetune import finetune, finetune_settings
from llava_mini.training.run_log import read_log
from tests.checkpoint.folders import stored_tensors
from tests.tuning_world import drawn_data, save_parts

ROOT = Path(__file__).parents[2]


def test_two_processes_train_as_one_does(tmp_path):
    torch.set_num_threads(1)
    start, parts = tmp_path / "start", list(map(str, save_parts(tmp_path)))
    build_model(join_parts(*parts), torch.float32).save_pretrained(start)
    build_processor(join_parts(*parts)).save_pretrained(start)
    files = drawn_data(tmp_path / "data", images=6, clips=2)
    small = {"batch": 4, "micro_batch": 2, "steps": 3, "max_length": 1024, "max_frames": 2, "dtype": torch.float32}
    alone = finetune(
        str(start), replace(finetune_settings(), files=files, **small), new=NewParts(prefusion_num_layers=1)
    ).run(tmp_path / "alone")
    alone.execute()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    data = tmp_path / "data"
    flags = ["--batch", 4, "--micro-batch", 2, "--steps", 3, "--max-length", 1024, "--max-frames", 2]
    flags += ["--dtype", "float32", "--prefusion-layers", 1, "--device", "cpu", "--output", tmp_path / "both"]
    command = [*torchrun, "-m", "llava_mini_cli", "train", "finetune", data / "train.json", "--media", data]
    done = subprocess.run(
        list(map(str, [*command, "--model", start, *flags])),
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "both" / "model")
    assert done.stdout.count("on 2 devices (fsdp)") == 1
    one, two = (read_log(tmp_path / name / "log.jsonl")[-1] for name in ("alone", "both"))
    for name in ("loss", "gradient_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    trained = stored_tensors(tmp_path / "both" / "model")
    for name, value in stored_tensors(alone.model_dir).items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4)
