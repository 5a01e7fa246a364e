"""Both stages from end to end at toy size: put together, trained, saved, gone on with, and asked."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import llava_mini_cli
from llava_mini.checkpoint.assemble import NewParts
from llava_mini.data import stream_batches
from llava_mini.data.features import FeatureKind, images_in, plan_features, write_features
from llava_mini.inference.engine import Engine
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import REDUCERS
from llava_mini.recipes.finetune import finetune, finetune_settings, hd_parts
from llava_mini.recipes.pretrain import StartOfPretraining, pretrain, pretrain_settings
from llava_mini.recipes.tuning_data import find_data
from llava_mini.reducer_settings import REDUCER_SETTINGS
from llava_mini.training.lora import LoraSettings
from llava_mini.training.plan import Devices
from llava_mini.training.run_log import RunLog, read_log
from llava_mini.training.sharding import EngineSettings
from llava_mini.training.trainer import train_phase
from tests.checkpoint.folders import stored_tensors
from tests.tuning_world import drawn_data, drawn_shards, save_parts

SMALL = {"batch": 4, "micro_batch": 2, "steps": 3, "max_length": 1024, "max_frames": 2, "dtype": torch.float32}
TWO_LAYERS = NewParts(prefusion_num_layers=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with parts, data, and the model of a stage 1."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tuning")
    parts = save_parts(folder)
    files = drawn_data(folder / "data")
    start = StartOfPretraining(language_model=str(parts[0]), vision_tower=str(parts[1]))
    run = pretrain(start, replace(pretrain_settings(), files=files, **SMALL)).run(folder / "stage-1")
    run.execute()
    assert run.is_finished
    return folder, parts, files


def stage_2(world, *, model="stage-1/model", new=TWO_LAYERS, **fields):
    folder, _, files = world
    return finetune(str(folder / model), replace(finetune_settings(), **{"files": files, **SMALL, **fields}), new=new)


def losses(folder):
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


def test_stage_1_moves_the_projector_and_nothing_else(world):
    folder, parts, _ = world
    trained = stored_tensors(folder / "stage-1" / "model")
    language, tower = (stored_tensors(part) for part in parts)
    assert all(torch.equal(trained[f"language_model.{name}"], value) for name, value in language.items())
    assert all(torch.equal(trained[f"vision_tower.{name}"], value) for name, value in tower.items())
    start = pretrain(StartOfPretraining(language_model=str(parts[0]), vision_tower=str(parts[1]))).source().tensors
    assert not torch.equal(trained["projector.linear_1.weight"], start["projector.linear_1.weight"])


def test_stage_1_leaves_the_questions_out(world):
    _, parts, files = world
    start = StartOfPretraining(language_model=str(parts[0]), vision_tower=str(parts[1]))
    tuning = pretrain(start, replace(pretrain_settings(), files=files, **SMALL))
    batch = tuning.task().make_batch(0)
    words = tuning.processor.tokenizer.decode(batch.inputs.input_ids[0][batch.inputs.input_ids[0] < 261])
    question = tuning.data.mixture[0].messages[0]["content"][-1]["text"]
    assert question
    assert question not in words
    assert "<|user|>" not in words


def test_a_model_of_both_stages_answers(world, tmp_path):
    run = stage_2(world).run(tmp_path / "run")
    run.execute()
    assert run.is_finished
    model = LlavaMiniForConditionalGeneration.from_pretrained(run.model_dir)
    assert (model.config.reducer, model.config.tokens_per_frame, model.config.prefusion_num_layers) == ("query", 1, 2)
    engine = Engine.load(str(run.model_dir), device="cpu")
    image = next((world[0] / "data" / "images").glob("*.png"))
    assert engine.ask("What is there?", [str(image)], max_tokens=4).stats.answer_tokens > 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["settings"]["rates"]["language_model"] == 1e-4
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.parametrize("reducer", sorted(set(REDUCERS) - {"query", "identity", "average_pool"}))
def test_every_reducer_trains_and_answers(world, tmp_path, reducer):
    tokens = 4 if REDUCER_SETTINGS[reducer].most_tokens is not None else None
    new = NewParts(reducer=reducer, reducer_grid=2, reducer_tokens=tokens, prefusion_num_layers=0)
    run = stage_2(world, new=new, steps=1).run(tmp_path / "run")
    run.execute()
    assert all(0 < loss < 20 for loss in losses(tmp_path / "run"))
    engine, fresh = (Engine.load(str(run.model_dir), device="cpu") for _ in range(2))
    image = str(next((world[0] / "data" / "images").glob("*.png")))
    first = engine.ask("What is there?", [image], max_tokens=8)
    later = engine.ask("Is the star red?", [image], max_tokens=8)
    assert first.stats.vision_tokens <= engine.model.config.tokens_per_frame
    reads_anew = engine.model.reducer.reads_question or engine.model.reducer.drops_inside
    assert (later.stats.cached_frames, later.stats.cached_tokens > 0) == (1, not reads_anew)
    assert later.text == fresh.ask("Is the star red?", [image], max_tokens=8).text


def test_a_finished_run_is_not_run_again(world, tmp_path):
    run = stage_2(world, steps=1).run(tmp_path)
    run.execute()
    written = (run.model_dir / "model.safetensors").stat().st_mtime_ns
    run.execute()
    assert (run.model_dir / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("kind", ["files", "stream", "low-rank"])
def test_a_run_that_was_cut_off_gets_the_losses_of_one_that_was_not(world, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(stream_batches, "PLACES_EVERY", 1)
    is_streamed = kind == "stream"
    source = {"files": (), "stream": drawn_shards(tmp_path, world[2])} if is_streamed else {}
    source |= {"lora": LoraSettings(rank=2)} if kind == "low-rank" else {}

    def train(folder, *stops):
        for stop in stops:
            (phase,) = stage_2(world, steps=4, **source).run(folder).phases
            settings = replace(phase.settings, checkpoint_seconds=0.0, log_every=1)
            log = RunLog(folder, terminal=(tmp_path / "terminal").open("a"))
            task = phase.build()
            train_phase(task, settings, folder / "finetune", log, stop_after=stop)
        return task.module.state_dict()

    whole, parts = train(tmp_path / "whole", -1), train(tmp_path / "parts", 2, -1)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 4
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert len(list(tmp_path.glob("parts/finetune/places/*.jsonl"))) == 2 * is_streamed  # one for each lane


def test_attention_kernels_give_the_same_losses(world, tmp_path):
    def train(kernel):
        run = stage_2(world, steps=2).run(tmp_path / kernel, engine=EngineSettings(attention=kernel))
        (phase,) = run.phases
        log = RunLog(tmp_path / kernel, terminal=(tmp_path / "terminal").open("a"))
        task = phase.build()
        train_phase(task, replace(phase.settings, log_every=1), tmp_path / kernel / "finetune", log)
        parts = task.module.language_model.model, task.module.prefusion
        assert [part.config._attn_implementation for part in parts] == [kernel, kernel]
        return losses(tmp_path / kernel)

    fused = train("sdpa")
    assert len(fused) == 2
    assert train("eager") == pytest.approx(fused, rel=1e-5)


def test_a_run_remembers_its_attention_kernel_if_it_is_not_the_usual_one(world, tmp_path):
    engines = (None, *(EngineSettings(attention=kernel) for kernel in ("sdpa", "eager")))
    plain, usual, other = (stage_2(world).run(tmp_path, engine=engine).settings for engine in engines)
    assert usual == plain
    assert other == {**plain, "attention": "eager"}


def test_checkpoints_hold_what_trains_and_know_the_rest_again(world, tmp_path):
    start = shutil.copytree(world[0] / "stage-1" / "model", tmp_path / "start")
    run = stage_2(world, model=start, lora=LoraSettings(rank=2), steps=2).run(tmp_path / "run")
    run.execute(slice_minutes=1e-9)
    [checkpoint] = (tmp_path / "run" / "finetune").glob("step-*")
    weights = [name for name in stored_tensors(checkpoint) if name.startswith("module.")]
    assert {name.split(".")[1] for name in weights} == {"projector", "reducer", "prefusion", "language_model"}
    assert all(".lora_" in name for name in weights if name.startswith("module.language_model."))
    tensors = stored_tensors(start)
    tensors["vision_tower.post_layernorm.bias"] += 1
    save_file(tensors, start / "model.safetensors")
    with pytest.raises(ValueError, match="than those that are here, in vision_tower. Was the model replaced"):
        run.execute()


def test_going_on_from_a_saved_model_resets_no_part(world, tmp_path):
    run = stage_2(world, steps=2).run(tmp_path)
    run.execute()
    saved = stored_tensors(run.model_dir)
    on = finetune(str(run.model_dir), replace(finetune_settings(), files=world[2], **SMALL))
    found = on.task().module.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in saved.items())
    assert on.processor.chat_template == stage_2(world).processor.chat_template


def test_hd_and_random_prefusion_train_too(world, tmp_path):
    new = replace(hd_parts(), reducer_grid=2, prefusion_num_layers=1, prefusion_start="random")
    tuning = stage_2(world, new=new)
    assert (tuning.config.views_per_frame, tuning.config.tokens_per_frame) == (5, 4)
    task = tuning.task()
    total = task.losses(task.make_batch(0)).total
    total.backward()
    assert torch.isfinite(total)
    assert task.module.prefusion.layers[0].block.mlp.up_proj.weight.grad.any()


def test_kept_features_give_the_losses_of_the_tower(world, tmp_path):
    plain = stage_2(world).task()
    kind = FeatureKind.of(plain.module.vision_tower, stage_2(world).processor)
    images = images_in(stage_2(world).data.mixture)
    write_features(plain.module.vision_tower, plan_features(images, tmp_path, kind))
    kept = stage_2(world, features=tmp_path).task()
    images = next(index for index in range(6) if kept.make_batch(index).inputs.features is not None)
    assert plain.make_batch(images).inputs.features is None
    losses = [task.losses(task.make_batch(images)).total for task in (plain, kept)]
    torch.testing.assert_close(*losses)


def test_low_rank_updates_are_saved_alone_and_merged(world, tmp_path):
    tuning = stage_2(world, lora=LoraSettings(rank=2), rates=replace(finetune_settings().rates, low_rank=1e-2))
    run = tuning.run(tmp_path)
    run.execute()
    trained = run.trained().module.eval()
    merged = LlavaMiniForConditionalGeneration.from_pretrained(run.model_dir).eval()
    inputs = tuning.task().make_batch(0).inputs
    fields = {name: value for name, value in vars(inputs).items() if value is not None}
    with torch.no_grad():
        torch.testing.assert_close(merged(**fields).logits, trained(**fields).logits, atol=1e-4, rtol=1e-4)
    start = stored_tensors(world[0] / "stage-1" / "model")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(start[name], stored_tensors(run.model_dir)[name])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    (run.model_dir / "generation_config.json").unlink()  # as if it had been cut off there
    run.save(run.trained(), run.model_dir)
    assert (run.model_dir / "generation_config.json").exists()
    with pytest.raises(ValueError, match="holds an adapter. Merge it first"):
        finetune(str(tmp_path / "adapter"))


def test_the_plan_counts_the_data(world):
    plan = stage_2(world, steps=None, epochs=2.0).plan(Devices())
    assert plan.num_samples == 8
    assert plan.num_steps == 6  # 4 micro-batches of images and 2 of films, twice
    assert plan.measured_on == 8
    assert 1 < plan.tokens_per_sample < 1024
    assert {part.name: part.rates for part in plan.parts}["prefusion"] == (1e-5,)


def test_what_is_there_already_is_not_described_anew(world, tmp_path):
    with pytest.raises(ValueError, match="has the reducer 'query' and 3 pre-fusion layers already"):
        finetune("tiny", new=TWO_LAYERS)
    with pytest.raises(ValueError, match="It goes on with train finetune"):
        pretrain(StartOfPretraining(model="tiny"))
    with pytest.raises(ValueError, match="Give language_model"):
        StartOfPretraining()


def test_stage_1_has_no_low_rank_updates(world):
    parts = StartOfPretraining(language_model=str(world[1][0]), vision_tower=str(world[1][1]))
    with pytest.raises(ValueError, match="train finetune has it"):
        pretrain(parts, replace(pretrain_settings(), lora=LoraSettings()))


def test_what_decides_nothing_may_change_when_a_run_goes_on(world, tmp_path):
    settings = stage_2(world).run(tmp_path).settings
    assert stage_2(world, max_damaged_share=0.5, checkpoint_minutes=1.0, keep_last=5).run(tmp_path).settings == settings
    assert stage_2(world, seed=1).run(tmp_path).settings != settings


def test_files_folders_and_weights_go_together(tmp_path):
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    files, stream = find_data(names, [tmp_path], [1.0, 0.5])
    assert stream is None
    assert [(file.media_folder, file.weight) for file in files] == [(tmp_path, 1.0), (tmp_path, 0.5)]
    assert find_data(names)[0][0].folder == tmp_path
    with pytest.raises(ValueError, match="2 data files came with 3 weights"):
        find_data(names, (), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="There is no folder"):
        find_data(names, [tmp_path / "nowhere"])


def test_shards_are_one_stream_without_weights(world, tmp_path):
    stream = drawn_shards(tmp_path, world[2])
    assert find_data([str(tmp_path / "part-*.parquet")], seed=3) == ((), replace(stream, seed=3))
    with pytest.raises(ValueError, match="Give files or shards, not both"):
        find_data([*stream.shards, "a.json"])
    assert find_data(stream.shards, window=9)[1] == replace(stream, window=9)
    with pytest.raises(ValueError, match="A window is of shards"):
        find_data(["a.json"], window=9)
    with pytest.raises(ValueError, match="1 weights and 0 media folders"):
        find_data(stream.shards, (), [1.0])


def test_a_stream_has_steps_and_neither_files_nor_kept_features(world, tmp_path):
    stream = drawn_shards(tmp_path, world[2])
    with pytest.raises(ValueError, match="Give the number of steps"):
        replace(finetune_settings(), stream=stream)
    for other in ({"files": world[2]}, {"features": tmp_path}):
        with pytest.raises(ValueError, match="came with files or with kept features"):
            replace(finetune_settings(), stream=stream, steps=1, **other)


def test_the_plan_of_a_stream_measures_its_first_samples(world, tmp_path):
    plan = stage_2(world, files=(), stream=drawn_shards(tmp_path, world[2])).plan(Devices())
    assert (plan.num_samples, plan.num_steps, plan.measured_on) == (None, 3, 8)
    assert plan.tokens_per_sample == stage_2(world).plan(Devices()).tokens_per_sample


def test_the_command_trains_both_stages(world, tmp_path, capsys):
    folder, parts, _ = world
    data, small = (
        folder / "data",
        ("--batch", 2, "--micro-batch", 1, "--steps", 1, "--max-frames", 2, "--device", "cpu"),
    )

    def run(*arguments):
        code = llava_mini_cli.main(list(map(str, arguments)))
        return code, capsys.readouterr().out

    given = ("train", "pretrain", data / "train.json", "--media", data, *small)
    code, told = run(*given, "--language-model", parts[0], "--vision-tower", parts[1], "--output", tmp_path / "one")
    assert (code, told.splitlines()[-1]) == (0, str(tmp_path / "one" / "model"))
    assert "projector" in told
    given = ("train", "finetune", data / "train.json", "--media", data, *small, "--model", tmp_path / "one" / "model")
    code, told = run(*given, "--prefusion-layers", 1, "--dtype", "float32", "--output", tmp_path / "two")
    assert (code, told.splitlines()[-1]) == (0, str(tmp_path / "two" / "model"))
    assert "language_model" in told
    drawn_shards(tmp_path, world[2])
    given = ("train", "finetune", tmp_path / "part-*.parquet", *small, "--model", tmp_path / "two" / "model")
    code, told = run(*given, "--output", tmp_path / "three")
    assert (code, told.splitlines()[-1]) == (0, str(tmp_path / "three" / "model"))


def test_data_are_checked_for_the_model_that_would_train(world, capsys):
    folder, parts, _ = world
    given = (folder / "data" / "train.json", "--media", folder / "data", "--check", "--max-frames", 2)
    starts = {
        "pretrain": ("--language-model", parts[0], "--vision-tower", parts[1]),
        "finetune": ("--model", folder / "stage-1" / "model", "--prefusion-layers", 1),
    }
    tokens = {}
    for stage, start in starts.items():
        assert llava_mini_cli.main(list(map(str, ("train", stage, *given, *start)))) == 0
        told = capsys.readouterr().out
        assert "damaged: 0 of 8" in told
        tokens[stage] = told.partition("  vision  | ")[2].split()[0]
        assert ("fused" in told) == (stage == "finetune")
    assert tokens == {"pretrain": "16", "finetune": "1"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--model", "llava-mini-vicuna-7b", "--gpus", "8", "--micro-batch", "8"], "on 8 devices (fsdp)"),
        (["finetune", "--model", "llava-v1.5-7b", "--hd", "--lora", "--four-bit"], "0.0002"),
        (["finetune", "--model", "llama-3.1-8b", "--hd", "--gpus", "8"], "8,030,261,248     8,030,261,248   0.0001"),
        (
            ["pretrain", "--language-model", "llama-3.1-8b", "--gpus", "64", "--micro-batch", "4"],
            "on 64 devices (fsdp)",
        ),
    ],
)
def test_a_dry_run_needs_neither_weights_nor_data_nor_devices(arguments, words, capsys):
    assert llava_mini_cli.main(["train", *arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert words in told
    assert "vision_tower           303,507,456                 0   frozen" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--model", "tiny"], "There is no data to train on"),
        (["finetune", "--model", "tiny", "--gpus", "2"], "--gpus is for --dry-run"),
        (["finetune", "--model", "tiny", "--four-bit"], "Give --lora with them"),
        (["finetune", "--model", "tiny", "--lora-rank", "8"], "Give --lora with them"),
        (["finetune", "--model", "tiny", "--lora-rate", "1e-4"], "Give --lora with them"),
        (["finetune", "--model", "tiny", "--lora", "--language-model-rate", "1e-4"], "Give --lora-rate"),
        (["finetune", "--model", "tiny", "--lora", "--lora-prefusion", "--prefusion-rate", "1e-4"], "Give --lora-rate"),
        (["finetune", "nowhere/*.tar", "--model", "tiny"], "No file matches 'nowhere/*.tar'"),
        (["finetune", "--model", "nowhere", "--dry-run"], "There is no model 'nowhere'"),
        (["pretrain", "--dry-run"], "Give language_model"),
        (["finetune", "--model", "tiny", "--dry-run", "--micro-batch", "7"], "Choose a micro_batch that divides it"),
        (["finetune", "--model", "tiny", "--dry-run", "--gpus", "64"], "Choose a multiple of 512"),
        (["finetune", "a.json", "--model", "llama-3.1-8b"], "There is no model 'llama-3.1-8b'"),
        (
            ["finetune", "no-file.json", "--model", "tiny", "--device", "cpu", "--attention", "flash_attention_2"],
            "flash_attention_2 runs on a GPU alone, but this training runs on cpu",
        ),
    ],
)
def test_flags_that_do_not_go_together_end_with_2_and_a_sentence(arguments, words, capsys):
    assert llava_mini_cli.main(["train", *arguments]) == 2
    assert words in capsys.readouterr().err
