import json
import math
from dataclasses import replace

import pytest
import torch

import llava_mini
from llava_mini.data.synthetic.world import IMAGE_KINDS
from llava_mini.recipes import tiny as recipe
from llava_mini.recipes.tiny import FULL_MINUTES, tiny, tiny_settings, train_tiny
from llava_mini.training.run_log import read_log
from llava_mini.training.trainer import load_weights

PHASES = ("vision", "language", "stage-1", "alignment", "stage-2", "finishing")


def test_a_smoke_run_passes_through_all_phases_and_beats_the_blind_guess(tmp_path):
    torch.set_num_threads(1)
    scores = train_tiny(tmp_path, smoke=True)
    assert scores["all"].exact > scores["all"].blind + 0.25

    phases = [line["phase"] for line in read_log(tmp_path / "log.jsonl")]
    assert list(dict.fromkeys(phases)) == list(PHASES)
    assert json.loads((tmp_path / "scores.json").read_text())["all"]["exact"] == scores["all"].exact

    model = llava_mini.LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = llava_mini.LlavaMiniProcessor.from_pretrained(tmp_path / "model")
    assert model.config.tokens_per_frame == processor.tokens_per_frame == 1
    assert model.dtype == torch.bfloat16
    assert model.generation_config.min_new_tokens == 1
    assert not any("thing_heads" in name for name in model.state_dict())

    phases = {phase.settings.name: phase for phase in tiny(output_dir=tmp_path, smoke=True).phases}
    encoder, start = phases["vision"].build().module, phases["stage-2"].build().module
    load_weights(encoder, tmp_path / "vision")
    for part, trained in ((start.model.reducer, encoder.reducer), (start.model.vision_tower, encoder.tower)):
        assert all(torch.equal(value, trained.state_dict()[name]) for name, value in part.state_dict().items())

    finished = (tmp_path / "log.jsonl").read_text()
    assert train_tiny(tmp_path, smoke=True)["all"] == scores["all"]
    assert (tmp_path / "log.jsonl").read_text() == finished


def test_every_phase_has_a_purpose_and_rules_for_every_parameter(tmp_path):
    run = tiny(output_dir=tmp_path, smoke=True)
    assert [phase.settings.name for phase in run.phases] == list(PHASES)
    assert all(phase.purpose for phase in run.phases)
    for phase in run.phases[:2]:
        names = [name for name, _ in phase.build().module.named_parameters()]
        rates = [phase.settings.stage.rate_of(name) for name in names]
        assert max(rates) > 0


def test_stage_2_asks_little_about_each_clip_and_describes_in_conversations_only():
    settings = tiny_settings()
    late = settings.stage_2_steps // 8 * 4
    records = [record for step in range(late + 1, late + 4) for record in recipe._stage_2_records(settings, step)]
    clips = [record for record in records if record.video]
    assert clips
    assert max(len(record.turns) for record in clips) == settings.clip_turns
    assert max(len(record.turns) for record in records if not record.video) > settings.clip_turns
    assert not any(turn.kind.endswith("caption") for record in records for turn in record.turns)
    talks = recipe._stage_2_records(settings, late)
    assert any(turn.kind.endswith("caption") for record in talks for turn in record.turns)
    assert not any(record.video for record in recipe._stage_2_records(settings, 1))


def test_the_last_phase_asks_more_about_clips_and_shows_pictures_of_nothing():
    settings = tiny_settings()
    stage_2 = [record for step in range(1001, 1004) for record in recipe._stage_2_records(settings, step)]
    finishing = [record for step in range(1, 4) for record in recipe._finishing_records(settings, step)]
    assert sum(bool(record.video) for record in finishing) > sum(bool(record.video) for record in stage_2)
    answers = {turn.answer for record in finishing for turn in record.turns if record.image is not None}
    assert {"0", "no", "nothing is written"} <= answers
    without_clips = replace(settings, world=replace(settings.world, clip_share=0.0))
    assert not any(record.video for record in recipe._finishing_records(without_clips, 1))


def test_kinds_are_asked_as_often_as_their_emphasis_says():
    settings = replace(tiny_settings(), clip_start=1.0)
    only = replace(settings, emphasis={kind: float(kind == "size") for kind in IMAGE_KINDS})
    kinds = {turn.kind for step in (1, 2) for record in recipe._stage_2_records(only, step) for turn in record.turns}
    assert kinds == {"size"}
    with pytest.raises(ValueError, match="there are not: colours"):
        replace(settings, emphasis={"colours": 2.0})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        replace(settings, clip_turns=0)


def test_a_folder_with_another_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "other"}')
    with pytest.raises(ValueError, match="other settings"):
        train_tiny(tmp_path, smoke=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train_tiny(tmp_path, smoke=True, resume=False)


def test_minutes_scale_the_steps_of_every_phase():
    full, half = tiny_settings(), tiny_settings(minutes=FULL_MINUTES / 2)
    assert half.stage_2_steps == full.stage_2_steps // 2
    assert half.vision_steps == full.vision_steps // 2
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive number of minutes"):
            tiny_settings(minutes=wrong)
    with pytest.raises(ValueError, match="fixed length"):
        tiny_settings(smoke=True, minutes=5)
