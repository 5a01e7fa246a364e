import json

import pytest
import torch

import llava_mini
from llava_mini.recipes.tiny import tiny, tiny_settings, train_tiny
from llava_mini.training.run_log import read_log


def test_a_smoke_run_passes_through_all_phases_and_beats_the_blind_guess(tmp_path):
    torch.set_num_threads(1)
    scores = train_tiny(tmp_path, smoke=True)
    assert scores["all"].exact > scores["all"].blind + 0.25

    phases = [line["phase"] for line in read_log(tmp_path / "log.jsonl")]
    assert list(dict.fromkeys(phases)) == ["vision", "language", "stage-1", "alignment", "stage-2"]
    assert json.loads((tmp_path / "scores.json").read_text())["all"]["exact"] == scores["all"].exact

    model = llava_mini.LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = llava_mini.LlavaMiniProcessor.from_pretrained(tmp_path / "model")
    assert model.config.tokens_per_frame == processor.tokens_per_frame == 1
    assert model.dtype == torch.bfloat16
    assert not any("thing_heads" in name for name in model.state_dict())

    finished = (tmp_path / "log.jsonl").read_text()
    assert train_tiny(tmp_path, smoke=True)["all"] == scores["all"]
    assert (tmp_path / "log.jsonl").read_text() == finished


def test_every_phase_has_a_purpose_and_rules_for_every_parameter(tmp_path):
    run = tiny(output_dir=tmp_path, smoke=True)
    assert [phase.settings.name for phase in run.phases] == ["vision", "language", "stage-1", "alignment", "stage-2"]
    assert all(phase.purpose for phase in run.phases)
    for phase in run.phases[:2]:
        names = [name for name, _ in phase.build().module.named_parameters()]
        rates = [phase.settings.stage.rate_of(name) for name in names]
        assert max(rates) > 0


def test_a_folder_with_another_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "other"}')
    with pytest.raises(ValueError, match="other settings"):
        train_tiny(tmp_path, smoke=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train_tiny(tmp_path, smoke=True, resume=False)


def test_minutes_scale_the_steps_of_every_phase():
    full, half = tiny_settings(), tiny_settings(minutes=45)
    assert 0.4 < half.stage_2_steps / full.stage_2_steps < 0.8
    assert half.vision_steps < full.vision_steps
    with pytest.raises(ValueError, match="positive number of minutes"):
        tiny_settings(minutes=0)
    with pytest.raises(ValueError, match="fixed length"):
        tiny_settings(smoke=True, minutes=5)
