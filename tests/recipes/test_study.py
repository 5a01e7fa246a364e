"""The study on a start of a few steps: same data for all rows, rows that go on, what they leave, and the table."""

import json
from dataclasses import replace
from shutil import copytree

import pytest
import torch

from llava_mini.config import LlavaMiniConfig
from llava_mini.evaluation.exact_match import answer_records
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.recipes import study
from llava_mini.recipes.study_results import means_and_spreads, read_study, study_table
from llava_mini.recipes.study_rows import ROWS, Row, rows_of, with_needed
from llava_mini.recipes.tiny import parts_of
from llava_mini.training.checkpoints import held
from llava_mini.training.run_log import read_log
from llava_mini.training.trainer import progress_of

NAMES = [row.name for row in ROWS]


def row(name):
    return rows_of((name,))[0]


@pytest.fixture(scope="module")
def settings():
    torch.set_num_threads(1)
    smoke = study.study_settings(smoke=True, steps=4)
    few = {"vision_steps": 2, "language_steps": 2, "stage_1_steps": 1, "alignment_steps": 2}
    return replace(
        smoke,
        start=replace(smoke.start, **few, vision_batch=2, language_batch=2, batch=4),
        clip_share=0.5,
        questions=2,
        carrier_questions=2,
    )


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    """A study whose start is finished, and two rows with two seeds."""
    folder = tmp_path_factory.mktemp("study")
    assert study.train_study(folder, settings, rows=["query-prefusion-1", "all-tokens"], num_seeds=2, say=[].append)
    return folder


def questions(records):
    return [[(turn.question, turn.answer) for turn in record.turns] for record in records]


def weights(folder):
    return LlavaMiniForConditionalGeneration.from_pretrained(folder / "model").state_dict()


def test_all_rows_see_the_same_at_the_same_step_and_another_seed_something_else(settings):
    of_rows = [questions(study.row_records(settings, one, 0, 3)) for one in ROWS]
    assert len(of_rows) == len(NAMES) == len({*NAMES})
    assert all(found == of_rows[0] for found in of_rows)
    assert questions(study.row_records(settings, ROWS[0], 1, 3)) != of_rows[0]
    assert questions(study.row_records(settings, ROWS[0], 0, 4)) != of_rows[0]


def test_hd_rows_see_the_same_scenes_larger(settings):
    plain, hd = (
        study.row_records(settings, row(name), 0, 0) for name in ("all-tokens", "query-hd-1-token-prefusion-3")
    )
    assert questions(plain) == questions(hd)
    sides = {(a.image.width, b.image.width) for a, b in zip(plain, hd, strict=True) if a.image}
    assert sides == {(96, 192)}
    assert settings.bench(row("query-hd-1-token-prefusion-3"), 2).item("colour", 0).record().image.width == 192


def test_clips_are_there_from_the_first_step_on_and_nobody_is_asked_for_descriptions(settings):
    full = study.study_settings()
    records = [record for step in range(4) for record in study.row_records(full, ROWS[0], 0, step)]
    share = sum(bool(record.video) for record in records) / len(records)
    assert 0.15 < share < 0.5
    kinds = {turn.kind for record in records for turn in record.turns}
    assert len(kinds) > 15
    assert not any("caption" in kind for kind in (*kinds, *full.bench(ROWS[0], 1).weights.kinds))


@pytest.mark.parametrize("one", [row for row in ROWS if not row.weights_of], ids=lambda row: row.name)
def test_every_row_learns_from_the_same_start(one, settings, folder):
    task = study.row_task(settings, folder, one, 0)
    start = LlavaMiniForConditionalGeneration.from_pretrained(folder / "start" / "model")
    model = task.module.model
    for part in ("vision_tower",) if model.reducer.has_linear_projector else ("vision_tower", "projector"):
        expected, found = getattr(start, part).state_dict(), getattr(model, part).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    embeddings = start.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    losses = task.losses(task.make_batch(0))
    losses.total.backward()
    assert 0 < float(losses.total.detach()) < 20
    stage = study.row_run(settings, folder, one, 0).phases[0].settings.stage
    trained = [name for name, _ in task.module.named_parameters() if stage.rate_of(name) > 0]
    assert any(name.startswith("model.language_model.") for name in trained)
    assert any(name.startswith("thing_heads.") for name in trained) == (one.thing_weight > 0)
    full = one.full_size()
    assert full.prefusion_num_layers == model.config.prefusion_num_layers
    assert full.text.num_hidden_layers == 32 + one.deeper_by


def test_a_deeper_language_model_starts_with_copies_of_its_first_layers(settings, folder):
    task = study.row_task(settings, folder, row("all-tokens-deep"), 0)
    layers = task.module.model.language_model.model.layers
    start = LlavaMiniForConditionalGeneration.from_pretrained(folder / "start" / "model").language_model.model.layers
    assert len(layers) == len(start) + 3
    for place, source in enumerate([0, 1, 0, 0, 1]):  # two layers, three of them added
        found = layers[place].state_dict()
        assert all(torch.equal(value, found[name]) for name, value in start[source].state_dict().items())


def test_reducer_and_prefusion_start_as_the_row_says(settings, folder):
    def model(name, seed):
        return study.row_task(settings, folder, row(name), seed).module.model

    random, again, other = (model("query-prefusion-3", seed).reducer.queries for seed in (0, 0, 1))
    assert torch.equal(random, again)
    assert not torch.equal(random, other)
    trained = [model("query-prefusion-3-vision-start", seed).reducer.queries for seed in (0, 1)]
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], random)

    copied, fresh = (model(name, 0) for name in ("query-prefusion-1", "query-prefusion-3-random-start"))
    first = copied.language_model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(copied.prefusion.layers[0].block.mlp.up_proj.weight, first)
    assert not torch.equal(fresh.prefusion.layers[0].block.mlp.up_proj.weight, first)


def test_kept_features_change_no_loss(settings, folder, tmp_path):
    one = row("query-prefusion-1")
    plain, keeping, reading = (
        study.row_task(settings, folder, one, 0, features=features) for features in (None, tmp_path, tmp_path)
    )
    made, first = plain.losses(plain.make_batch(0)), keeping.losses(keeping.make_batch(0))
    batch = reading.make_batch(0)
    assert batch.inputs.pixel_values is None
    assert float(made.total.detach()) == float(first.total.detach()) == float(reading.losses(batch).total.detach())
    assert reading.make_batch(1).inputs.features is None


def test_a_row_goes_on_after_a_slice_as_if_it_had_not_been_cut(settings, folder, tmp_path):
    names = ["query-prefusion-1"]
    copy = tmp_path / "study"
    copy.mkdir()
    (copy / "start").symlink_to(folder / "start")
    assert not study.train_study(copy, settings, rows=names, num_seeds=1, slice_minutes=1e-4)
    step, _ = progress_of(copy / "rows" / names[0] / "seed-0" / "stage-2")
    assert 0 < step < settings.steps
    assert study.train_study(copy, settings, rows=names, num_seeds=1, say=[].append)
    expected, found = (weights(one / "rows" / names[0] / "seed-0") for one in (folder, copy))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_finished_study_trains_nothing_and_keeps_no_features(settings, folder):
    log = folder / "rows" / "all-tokens" / "seed-1" / "log.jsonl"
    before = log.read_text()
    assert study.train_study(folder, settings, rows=["all-tokens"], num_seeds=2, say=pytest.fail)
    assert log.read_text() == before
    assert not list(folder.glob("features/*"))


def test_other_steps_are_refused_in_the_same_folder(settings, folder):
    with pytest.raises(ValueError, match="different: steps"):
        study.train_study(folder, replace(settings, steps=5), rows=["all-tokens", "no-vision"], num_seeds=3)


def test_a_row_leaves_facts_about_cost_time_and_what_carries(settings, folder):
    facts = {
        name: json.loads((folder / "rows" / name / "seed-0" / "facts.json").read_text())
        for name in ("all-tokens", "query-prefusion-1")
    }
    one, every = facts["query-prefusion-1"], facts["all-tokens"]
    assert (one["tokens_per_frame"], every["tokens_per_frame"]) == (1, 144)
    assert every["full_size"]["tokens_per_frame"] == 576
    assert every["full_size"]["flops_paper"] == pytest.approx(8.55e12, rel=2e-3)
    assert one["full_size"]["flops_paper"] == pytest.approx(1.21e12, rel=2e-3)
    model = LlavaMiniForConditionalGeneration.from_pretrained(
        folder / "rows" / "query-prefusion-1" / "seed-0" / "model"
    )
    assert one["parameters"] == model.num_parameters()
    assert one["seconds_per_step"] > 0
    lines = read_log(folder / "rows" / "all-tokens" / "seed-0" / "log.jsonl")
    assert every["curve"] == [
        {"step": line["step"], "answer": round(line["loss"], 4), "right": round(line["right"]["tokens"], 4)}
        for line in lines
    ]
    assert "text raw" in one["carriers"]
    assert "text raw" not in every["carriers"]
    assert one["carriers"]["tokens zeroed"]["kept"].keys() == {"colour", "size"}  # there is one clip, with no other


def test_the_table_counts_rows_and_seeds(folder):
    found = read_study(folder)
    assert json.loads((folder / "study.json").read_text()) == found
    assert [(one["row"], len(one["seeds"])) for one in found["rows"]] == [("all-tokens", 2), ("query-prefusion-1", 2)]
    assert (found["settings"]["steps"], found["settings"]["batch"]) == (4, 4)
    means = means_and_spreads(found["rows"][0])
    values = [one["scores"]["colour"]["exact"] for one in found["rows"][0]["seeds"]]
    assert means["colour"][0] == pytest.approx(sum(values) / 2)
    assert means["colour"][1] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    text = study_table(found)
    assert [line.split()[:3] for line in text.splitlines()[1:3]] == [
        ["all-tokens", "2", "144"],
        ["query-prefusion-1", "2", "1"],
    ]
    assert "clip colour" in text


def test_a_row_without_vision_tokens_is_saved_and_loaded_with_the_same_answers(settings, folder, tmp_path):
    one = row("no-vision-token-prefusion-3")
    task = study.row_task(settings, folder, one, 0)
    with torch.no_grad():  # after no training all answers are alike
        task.module.model.language_model.lm_head.weight.normal_()
    for part in parts_of(task):
        part.save_pretrained(tmp_path)
    records = [
        settings.bench(one, 3).item(kind, index).record() for kind in ("colour", "clip colour") for index in (0, 1)
    ]
    answers = answer_records(*parts_of(task), records, max_new_tokens=6)
    loaded = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path)
    assert answers == answer_records(
        loaded.eval(), LlavaMiniProcessor.from_pretrained(tmp_path), records, max_new_tokens=6
    )
    assert len({*answers}) > 1


def test_wrong_wishes_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match=r"no row 'query'. Its rows are: all-tokens, query-prefusion-3"):
        study.train_study(tmp_path, settings, rows=["query"])
    with pytest.raises(ValueError, match="at least one seed, got 0"):
        study.train_study(tmp_path, settings, num_seeds=0)
    with pytest.raises(ValueError, match="positive number of minutes, got 0"):
        study.train_study(tmp_path, settings, slice_minutes=0)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        study.study_settings(steps=0)
    with pytest.raises(ValueError, match="holds no study"):
        read_study(tmp_path)
    with pytest.raises(ValueError, match="look at vision tokens"):
        Row(name="odd", shows="Nothing.", changes={"vision_tokens_from": "nowhere"}, thing_weight=1.0)
    assert isinstance(ROWS[0].config(LlavaMiniConfig()), LlavaMiniConfig)


def test_a_method_without_training_answers_with_the_weights_of_its_row(settings, folder, tmp_path):
    source, method = row("all-tokens"), row("divprune-untrained")
    task = study.row_task(settings, folder, source, 0)
    task.module.eval()
    with torch.no_grad():
        task.module.model.language_model.lm_head.weight.normal_()
    records = [settings.bench(source, 3).item("colour", index).record() for index in range(3)]
    whole = {"reducer": "divprune", "reducer_tokens": 144}
    model, processor = study.with_fields(*parts_of(task), whole)
    assert answer_records(model, processor, records) == answer_records(*parts_of(task), records)
    fewer, _ = study.with_fields(*parts_of(task), method.changes)
    assert fewer.config.tokens_per_frame == 16
    assert all(torch.equal(value, fewer.state_dict()[name]) for name, value in model.state_dict().items())


def test_methods_of_any_number_of_tokens_are_scored_with_the_one_of_their_row(settings, folder):
    one = row("mqt-2-tokens")
    task = study.row_task(settings, folder, one, 0)
    model, processor = study.scored_parts(task, one)
    assert task.module.model.config.tokens_per_frame == 64
    assert (model.config.tokens_per_frame, processor.tokens_per_frame) == (2, 2)


def test_rows_that_are_needed_stand_before_those_that_need_them_and_need_nothing():
    names = [row.name for row in rows_of()]
    needing = [row for row in rows_of() if row.needs]
    assert len(needing) >= 12
    for one in needing:
        assert [found.name for found in with_needed([one])] == [*one.needs, one.name]
        assert all(names.index(name) < names.index(one.name) for name in one.needs)
        assert not any(row(name).needs for name in one.needs)


def test_a_row_waits_for_the_needed_one_that_another_process_trains(settings, folder):
    said, needed = [], folder / "rows" / "query-prefusion-3" / "seed-0"
    needed.mkdir(parents=True)
    with held(needed):
        assert not study.train_study(folder, settings, rows=["time-plain"], num_seeds=1, say=said.append)
    assert said == [
        "Another process trains query-prefusion-3 with seed 0.",
        "time-plain needs the trained query-prefusion-3 with seed 0, which is not there yet.",
    ]


def test_a_start_of_other_settings_is_refused_and_one_of_fewer_fields_taken(settings, folder, tmp_path):
    copytree(folder / "start", tmp_path / "start")
    record = json.loads((tmp_path / "start" / "run.json").read_text())
    del record["settings"]["config"]["reducer_tokens"]
    (tmp_path / "start" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="start holds a run with other settings .*different: alignment_steps, batch"):
        study.train_study(tmp_path, study.study_settings())
    assert not study.train_study(tmp_path, settings, rows=["query-prefusion-0"], slice_minutes=1e-4)
    assert progress_of(tmp_path / "rows" / "query-prefusion-0" / "seed-0" / "stage-2")[0] > 0


def test_the_folder_of_another_run_is_refused(settings, folder):
    with pytest.raises(ValueError, match="start' holds another run. Give the study a folder of its own"):
        study.train_study(folder / "start", settings)


def test_a_row_about_time_goes_on_from_a_trained_row_and_learns_from_clips_alone(settings, folder):
    source, going_on = row("all-tokens"), row("time-all-tokens")
    task = study.row_task(settings, folder, going_on, 0)
    model = task.module.model.state_dict()
    assert all(
        torch.equal(value.float(), model[name].float()) for name, value in weights(run_of(folder, source)).items()
    )
    assert settings.steps_of(going_on) == settings.steps // 2
    records = study.row_records(settings, going_on, 0, 0)
    assert all(record.video for record in records)
    assert set(settings.bench(going_on, 3).weights.kinds) == {"direction", "order", "event count"}
    assert study.train_study(folder, settings, rows=["time-all-tokens"], num_seeds=1, say=[].append)
    found = read_study(folder)
    assert [one["row"] for one in found["time"]] == ["time-all-tokens"]
    assert "time-all-tokens" in study_table(found)


def test_a_row_is_taught_by_the_trained_model_of_another(settings, folder):
    one = Row(name="odd", shows="Taught.", changes={"prefusion_num_layers": 1}, taught_by="all-tokens")
    task = study.row_task(settings, folder, one, 0)
    losses = task.losses(task.make_batch(0))
    assert losses.parts["teacher"] > 0
    assert losses.total.item() == pytest.approx(losses.parts["answer"] + losses.parts["teacher"], rel=1e-4)
    losses.total.backward()
    teaching = [*task.teacher.parameters()]
    assert teaching
    assert all(value.grad is None for value in teaching)


def run_of(folder, one, seed=0):
    return folder / "rows" / one.name / f"seed-{seed}"
