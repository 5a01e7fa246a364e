"""Several processes train as one does. Each failure is caused, not described."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_mini.data.quarantine import Damaged
from llava_mini.training import folders
from llava_mini.training.folders import load_folder, newest_folder
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.trainer import load_weights, progress_of
from llava_mini.training.world import World
from tests.checkpoint.folders import stored_tensors
from tests.training.ranks import run_ranks
from tests.training.tuning import STAGE, Draw, Tuning, fresh_model, train

FSDP, DDP = {"strategy": "fsdp"}, {"strategy": "ddp"}
LEARNED = {"projector", "reducer", "prefusion", "language_model"}
"""The parts that train, and are stored."""


def weights_in(folder):
    model = fresh_model()
    load_folder(model, newest_folder(folder / "stage-2"))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(ends):
    """The log of a run whose processes all ended well."""
    assert [(end.error, end.text) for end in ends] == [("", "")] * len(ends)
    return ends[0].value


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, with the micro-batches of a step as one."""
    folder = tmp_path_factory.mktemp("alone")
    return train(World(), folder / "run", None, {"joined": 2}), weights_in(folder / "run")


def equals(found, expected):
    assert len(found) == len(expected) == 6
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-5, atol=1e-6)


def test_accumulated_micro_batches_learn_as_one(tmp_path, alone):
    equals(train(World(), tmp_path / "run", accumulate=2), alone[0])
    torch.testing.assert_close(weights_in(tmp_path / "run"), alone[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "engine", [FSDP, DDP, {**FSDP, "checkpoint_activations": True}], ids=["fsdp", "ddp", "fsdp, recomputed"]
)
def test_two_processes_learn_as_one(tmp_path, alone, engine):
    equals(trained(run_ranks(2, train, tmp_path, tmp_path / "run", engine)), alone[0])
    torch.testing.assert_close(weights_in(tmp_path / "run"), alone[1], rtol=1e-3, atol=1e-4)
    names = stored_tensors(newest_folder(tmp_path / "run" / "stage-2"))
    assert {name.split(".")[1] for name in names if name.startswith("module.")} == LEARNED


def accumulated(world, folder, engine):
    return train(world, folder, engine, accumulate=2)


@pytest.mark.parametrize("engine", [FSDP, DDP], ids=["fsdp", "ddp"])
def test_two_processes_accumulate_as_one_does(tmp_path, engine):
    expected = train(World(), tmp_path / "alone", accumulate=4)
    equals(trained(run_ranks(2, accumulated, tmp_path, tmp_path / "run", engine)), expected)


def in_bfloat16(world, folder, engine):
    return train(world, folder, engine, {"dtype": torch.bfloat16})


def test_bfloat16_models_train_on_float32_masters_in_two_processes_too(tmp_path):
    expected = train(World(), tmp_path / "alone", None, {"dtype": torch.bfloat16}, accumulate=2)
    found = trained(run_ranks(2, in_bfloat16, tmp_path, tmp_path / "run", FSDP))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.03, atol=0.01)
    assert found[-1][0] < found[0][0]
    stored = weights_in(tmp_path / "run")
    assert not torch.equal(stored, stored.bfloat16().float())


def first_stage(world, folder, engine, **fields):
    rules = (Rule(part=r"projector\.", rate=1e-2), Rule(part=r"(?!projector\.)", rate=0.0))
    model = {"reducer": "identity", "prefusion_num_layers": 0}
    return train(world, folder, engine, {"model": model}, stage=Stage(name="stage-1", rules=rules), **fields)


def tied(world, folder, engine, **fields):
    return train(world, folder, engine, {"model": {"text": {"tie_word_embeddings": True}}}, **fields)


def asked(world, folder, engine, **fields):
    """The language model reads each question alone, without gradients, before it reads the prompt."""
    rules = (Rule(part=r"vision_tower\.", rate=0.0), Rule(part=r"(?!vision_tower\.)", rate=1e-3))
    model = {"reducer": "quecc", "prefusion_num_layers": 0}
    return train(world, folder, engine, {"model": model}, stage=Stage(name="stage-2", rules=rules), **fields)


def inside(world, folder, engine, **fields):
    """Compression by queries that the layers of the language model run."""
    model = {"reducer": "query_inside", "reducer_grid": 2, "prefusion_num_layers": 0}
    stage = Stage(name="stage-2", rules=tuple(rule for rule in STAGE.rules if "prefusion" not in rule.part))
    return train(world, folder, engine, {"model": model}, stage=stage, **fields)


@pytest.mark.parametrize(
    "kind",
    [first_stage, tied, asked, inside],
    ids=["first stage", "tied embeddings", "question first", "inside the language model"],
)
def test_two_processes_learn_as_one_with(tmp_path, kind):
    expected = kind(World(), tmp_path / "alone", None, accumulate=2)
    equals(trained(run_ranks(2, kind, tmp_path, tmp_path / "run", FSDP)), expected)


def begun(world, folder, engine):
    """Killed after the fourth step; the last checkpoint is that of the third."""
    return train(world, folder, engine, stop_after=4)


def test_what_two_processes_began_one_goes_on_with(tmp_path, alone):
    trained(run_ranks(2, begun, tmp_path, tmp_path / "run", FSDP))
    assert progress_of(tmp_path / "run" / "stage-2")[0] == 3
    equals(train(World(), tmp_path / "run", accumulate=2), alone[0])


@pytest.mark.parametrize("engine", [FSDP, DDP], ids=["fsdp", "ddp"])
def test_what_one_process_began_two_go_on_with(tmp_path, alone, engine):
    train(World(), tmp_path / "run", accumulate=2, stop_after=4)
    assert progress_of(tmp_path / "run" / "stage-2")[0] == 3
    equals(trained(run_ranks(2, train, tmp_path, tmp_path / "run", engine)), alone[0])


def test_another_number_of_micro_batches_in_a_step_is_refused(tmp_path):
    train(World(), tmp_path / "run", accumulate=2)
    with pytest.raises(ValueError, match="'micro_batches': 2.* keep accumulate times the number of processes"):
        train(World(), tmp_path / "run")


def dropping_out(world, folder, stop_after=-1):
    return train(world, folder, FSDP, {"model": {"text": {"attention_dropout": 0.3}}}, stop_after=stop_after)


def test_what_drops_out_goes_on_in_each_of_two_processes(tmp_path, alone):
    whole = trained(run_ranks(2, dropping_out, tmp_path, tmp_path / "whole"))
    assert whole[0][0] != pytest.approx(alone[0][0][0], rel=1e-3)
    trained(run_ranks(2, dropping_out, tmp_path, tmp_path / "run", 4))
    equals(trained(run_ranks(2, dropping_out, tmp_path, tmp_path / "run")), whole)


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    train(World(), tmp_path / "run", None, {"fingerprint": "one"}, stop_after=4)
    with pytest.raises(ValueError, match=r"step-00000003 holds \{'data': 'one'\} but this run has \{'data': 'two'\}"):
        train(World(), tmp_path / "run", None, {"fingerprint": "two"})
    train(World(), tmp_path / "run", None, {"fingerprint": "one"})


def with_data_of_its_own(world, folder):
    return train(world, folder, FSDP, {"fingerprint": str(world.rank)})


def test_processes_that_read_different_data_are_refused(tmp_path):
    ends = run_ranks(2, with_data_of_its_own, tmp_path, tmp_path / "run")
    assert [end.error for end in ends] == ["ValueError", "ValueError"]
    assert ends[0].text.startswith("Rank 1 reads other data than rank 0")


def with_fault(world, folder, engine, number, fault):
    return train(world, folder, engine, {"faults": ((number, fault),)})


@pytest.mark.parametrize("engine", [FSDP, DDP], ids=["fsdp", "ddp"])
def test_a_killed_process_ends_all_with_one_line_that_names_it_and_the_run_goes_on(tmp_path, alone, engine):
    first, second = run_ranks(2, with_fault, tmp_path, tmp_path / "run", engine, 7, "killed", once=True)
    assert second.code == -signal.SIGKILL
    assert (first.error, first.text) == ("SystemExit", "2")
    [line] = first.terminal.splitlines()
    assert line.startswith("llava-mini: Rank 1 (process ")
    assert "ended without a word: killed" in line
    assert progress_of(tmp_path / "run" / "stage-2")[0] == 3
    equals(trained(run_ranks(2, train, tmp_path, tmp_path / "run", engine)), alone[0])


def test_if_the_first_process_is_killed_the_second_tells(tmp_path):
    first, second = run_ranks(2, with_fault, tmp_path, tmp_path / "run", FSDP, 6, "killed", once=True)
    assert first.code == -signal.SIGKILL
    [line] = second.terminal.splitlines()
    assert line.startswith("llava-mini: Rank 0 (process ")


def test_an_error_in_one_process_is_told_by_all_with_its_cause(tmp_path):
    first, second = run_ranks(2, with_fault, tmp_path, tmp_path / "run", FSDP, 5, "bug")
    assert (second.error, second.text) == ("ZeroDivisionError", "one of these")
    assert first.error == "ChildProcessError"
    assert first.text == "Rank 1 failed. ZeroDivisionError: one of these"


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ("nan", "ValueError", "The loss of phase 'stage-2' is nan at step 1 (samples drawn/3-0, drawn/3-1). The last"),
        ("unreadable", "ValueError", "drawn/3-0 cannot be read."),
        ("worker", "ChildProcessError", "A process that makes batches died."),
    ],
)
def test_what_one_process_finds_wrong_both_raise(tmp_path, fault, kind, told):
    ends = run_ranks(2, with_fault, tmp_path, tmp_path / "run", FSDP, 3, fault)
    assert [(end.error, end.text[: len(told)]) for end in ends] == [(kind, told)] * 2


@pytest.mark.parametrize("fault", ["nan", "zero"])
def test_a_loss_that_cannot_be_stops_and_names_the_samples(tmp_path, fault):
    told = {"nan": "nan", "zero": "0.0"}[fault]
    with pytest.raises(ValueError, match=rf"is {told} at step 3 \(samples drawn/3-0, drawn/3-1\)\. The last good"):
        with_fault(World(), tmp_path / "run", None, 3, fault)
    assert newest_folder(tmp_path / "run" / "stage-2").name == "step-00000003"


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops(tmp_path, monkeypatch):
    def steep(self, batch):
        losses = original(self, batch)
        if "drawn/2-0" in batch.ids:
            losses.total.register_hook(lambda gradient: gradient * torch.inf)
        return losses

    original = Tuning.losses
    monkeypatch.setattr(Tuning, "losses", steep)
    with pytest.raises(ValueError, match=r"length of the gradient of phase 'stage-2' is (nan|inf) at step 2 \(samples"):
        train(World(), tmp_path / "run", checkpoint_seconds=0.0)
    assert torch.isfinite(weights_in(tmp_path / "run")).all()


def test_a_step_without_supervised_tokens_stops_and_names_the_samples(tmp_path):
    told = r"Step 2 of phase 'stage-2' supervises nothing.*\(samples drawn/2-0, drawn/2-1\)"
    with pytest.raises(ValueError, match=told):
        with_fault(World(), tmp_path / "run", None, 2, "silent")


def test_a_micro_batch_without_supervised_tokens_counts_nothing_beside_another(tmp_path):
    ends = run_ranks(2, with_fault, tmp_path, tmp_path / "run", FSDP, 3, "silent")
    found = trained(ends)
    expected = train(World(), tmp_path / "alone", None, {"faults": ((3, "silent"),)}, accumulate=2)
    equals(found, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_ends_all_and_leaves_the_checkpoint_before_it_whole(tmp_path, alone, size):
    engine = FSDP if size == 2 else None
    fault = 4 * size - 1  # in the last process, in the fourth step
    ends = run_ranks(size, with_fault, tmp_path, tmp_path / "run", engine, fault, "disk full")
    assert [end.error for end in ends] == ["OSError"] * size
    assert "The checkpoint of step 4 could not be written" in ends[0].text
    assert "File too large" in ends[0].text
    assert "The one before, step-00000003, is whole." in ends[0].text
    phase = tmp_path / "run" / "stage-2"
    assert sorted(path.name for path in phase.iterdir()) == ["step-00000002", "step-00000003"]
    if size == 2:
        equals(trained(run_ranks(2, train, tmp_path, tmp_path / "run", engine)), alone[0])


def test_the_last_checkpoints_stay_and_hold_nothing_that_runs_code(tmp_path):
    train(World(), tmp_path / "run", checkpoint_seconds=0.0)
    phase = tmp_path / "run" / "stage-2"
    assert sorted(path.name for path in phase.iterdir()) == ["step-00000005", "step-00000006"]
    assert {path.suffix for path in phase.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert json.loads((phase / "step-00000006" / "facts.json").read_text())["step"] == 6


def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path):
    train(World(), tmp_path / "run", stop_after=4)
    [shard] = newest_folder(tmp_path / "run" / "stage-2").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match="step-00000003 is damaged.* Remove that folder to go on from the checkpoint"):
        train(World(), tmp_path / "run")


def test_a_checkpoint_that_lacks_a_part_of_a_tensor_is_refused(tmp_path):
    trained(run_ranks(2, begun, tmp_path, tmp_path / "run", FSDP))
    [shard] = newest_folder(tmp_path / "run" / "stage-2").glob("shard-00001-*.safetensors")
    shard.unlink()
    with pytest.raises(ValueError, match=r"step-00000003 is incomplete: of .* some parts are missing\. Remove that"):
        train(World(), tmp_path / "run", accumulate=2)
    with pytest.raises(ValueError, match="step-00000003 is incomplete"):
        load_weights(fresh_model(), tmp_path / "run" / "stage-2")


def test_unfinished_checkpoints_of_a_kill_are_removed_and_never_read(tmp_path):
    train(World(), tmp_path / "run", stop_after=4)
    left = tmp_path / "run" / "stage-2" / ".step-00000004.draft"
    left.mkdir()
    (left / "facts.json").write_text("{")
    assert progress_of(tmp_path / "run" / "stage-2")[0] == 3
    train(World(), tmp_path / "run")
    assert not left.exists()


def test_damaged_samples_are_listed_counted_and_above_a_share_they_stop_all(tmp_path):
    ends = run_ranks(2, with_faults, tmp_path, tmp_path / "run", FSDP, (3, 5))
    assert len(trained(ends)) == 6
    listed = [json.loads(line) for line in (tmp_path / "run" / "stage-2" / "quarantine.jsonl").open()]
    assert [line["id"] for line in listed] == ["drawn/3-0x", "drawn/5-0x"]
    last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["damaged"] == 2
    ends = run_ranks(2, with_faults, tmp_path, tmp_path / "more", FSDP, (3, 5, 6))
    assert [end.error for end in ends] == ["ValueError", "ValueError"]
    assert "3 of 19 samples are damaged" in ends[1].text


def test_a_step_whose_samples_are_all_damaged_stops_and_names_one(tmp_path, monkeypatch):
    def torn(self, micro, fault):
        damaged = tuple(Damaged(id=name, media="a.png", reason="The file is torn.") for name in micro.ids)
        return replace(micro, inputs=None, ids=(), damaged=damaged) if fault else micro

    monkeypatch.setattr(Draw, "with_fault", torn)
    monkeypatch.setattr(Tuning, "weight", lambda self, batch: float(batch.inputs is not None))
    told = "All 2 samples of step 2 of phase 'stage-2' are damaged; .* The first is drawn/2-0: The file is torn."
    with pytest.raises(ValueError, match=told):
        train(World(), tmp_path / "run", None, {"faults": ((2, "torn"),)}, max_damaged_share=1.0)


def with_faults(world, folder, engine, numbers):
    return train(world, folder, engine, {"faults": tuple((number, "damaged") for number in numbers)})


def test_a_list_of_damaged_samples_that_is_none_ends_all(tmp_path):
    phase = tmp_path / "run" / "stage-2"
    phase.mkdir(parents=True)
    (phase / "quarantine.jsonl").write_text("something else\n")
    ends = run_ranks(2, train, tmp_path, tmp_path / "run", FSDP)
    assert [end.error for end in ends] == ["ValueError", "ValueError"]
    assert "is no line of a quarantine list" in ends[1].text


def unshared(world, folder):
    folders.SHARED_SECONDS = 0.3
    return train(world, Path(f"{folder}-{world.rank}"), FSDP)


def test_a_folder_that_the_machines_do_not_share_is_refused(tmp_path):
    ends = run_ranks(2, unshared, tmp_path, tmp_path / "run")
    assert [end.error for end in ends] == ["ValueError", "ValueError"]
    assert "is not the same folder on all machines" in ends[0].text


def test_several_processes_need_a_strategy_and_folders(tmp_path):
    ends = run_ranks(2, train, tmp_path, tmp_path / "run")
    assert [end.text.startswith("2 processes need a strategy") for end in ends] == [True, True]
    ends = run_ranks(2, in_one_file, tmp_path, tmp_path / "run")
    assert [end.text.startswith("Checkpoints in one file are for one process") for end in ends] == [True, True]


def in_one_file(world, folder):
    return train(world, folder, FSDP, keep_last=None)
