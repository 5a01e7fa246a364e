"""Stage 2 among two processes is stage 2 alone: the same steps, losses and gradients."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_mini.checkpoint.assemble import NewParts, build_model, build_processor, join_parts
from llava_mini.data.features import FeatureKind, images_in, plan_features, write_features
from llava_mini.data.mixture import DataFile
from llava_mini.recipes.finetune import finetune, finetune_settings
from llava_mini.training.run_log import read_log
from llava_mini.training.sharding import EngineSettings
from tests.checkpoint.folders import stored_tensors
from tests.training.ranks import run_ranks
from tests.tuning_world import drawn_data, save_parts

ROOT = Path(__file__).parents[2]
SMALL = {"batch": 4, "micro_batch": 2, "steps": 3, "max_length": 1024, "max_frames": 2, "dtype": torch.float32}


def stage_2(folder, **fields):
    files = (DataFile(path=folder / "data" / "train.json", media_folder=folder / "data"),)
    settings = replace(finetune_settings(), files=files, **SMALL, **fields)
    return finetune(str(folder / "start"), settings, new=NewParts(prefusion_num_layers=1))


def last_line(folder):
    return {name: read_log(folder / "log.jsonl")[-1][name] for name in ("loss", "gradient_norm")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a start, six images and a film, and a run of one process, ``alone``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tuning")
    parts = list(map(str, save_parts(folder)))
    build_model(join_parts(*parts), torch.float32).save_pretrained(folder / "start")
    build_processor(join_parts(*parts)).save_pretrained(folder / "start")
    drawn_data(folder / "data", images=6, clips=1)
    stage_2(folder).run(folder / "alone").execute()
    return folder


def test_two_processes_train_as_one_does(world, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    data = world / "data"
    flags = ["--batch", 4, "--micro-batch", 2, "--steps", 3, "--max-length", 1024, "--max-frames", 2]
    flags += ["--dtype", "float32", "--prefusion-layers", 1, "--device", "cpu", "--output", tmp_path / "both"]
    command = [*torchrun, "-m", "llava_mini_cli", "train", "finetune", data / "train.json", "--media", data]
    done = subprocess.run(
        list(map(str, [*command, "--model", world / "start", *flags])),
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "both" / "model")
    assert done.stdout.count("on 2 devices (fsdp)") == 1
    assert last_line(tmp_path / "both") == pytest.approx(last_line(world / "alone"), rel=1e-5)
    trained = stored_tensors(tmp_path / "both" / "model")
    for name, value in stored_tensors(world / "alone" / "model").items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4)


def with_kept_features(ranks, folder, output):
    engine = EngineSettings(strategy="fsdp")
    stage_2(folder, features=folder / "kept").run(output, engine=engine, world=ranks).execute(world=ranks)


def test_kept_features_give_two_processes_what_the_tower_gives_one(world, tmp_path):
    plain = stage_2(world)
    tower = plain.task().module.vision_tower
    kind = FeatureKind.of(tower, plain.processor)
    write_features(tower, plan_features(images_in(plain.data.mixture), world / "kept", kind))
    make_batch = stage_2(world, features=world / "kept").task().make_batch
    looks = [make_batch(number).inputs.features is None for number in range(6)]
    assert {*zip(looks[::2], looks[1::2], strict=True)} == {(False, False), (True, False)}  # of both processes, by step
    for end in run_ranks(2, with_kept_features, tmp_path, world, tmp_path / "kept"):
        assert not end.error, end.text
    assert last_line(tmp_path / "kept") == pytest.approx(last_line(world / "alone"), rel=1e-5)
