"""The published sets as data, and the one that needs a conversion."""

import json
import typing

import pytest

import llava_mini_cli_data
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.published import PUBLISHED_SETS, convert_video_instructions, published_set


def test_numbers_of_a_set_agree_with_one_another():
    assert len(PUBLISHED_SETS) == 4
    exact = [one for one in PUBLISHED_SETS.values() if one.exact]
    assert exact
    for one in exact:
        assert round(sum(one.exact.values()) / one.rounded) * one.rounded == one.about
        assert sum(one.folders.values()) == one.exact["image"]
        assert set(one.exact) == set(one.kinds)


def test_what_is_as_published_has_no_differences():
    mix = published_set("llava-v1.5-mix665k")
    assert mix.differences(mix.exact, mix.folders) == []
    assert published_set("llava-pretrain").differences({"image": 558_128, "text": 0}, {}) == []


def test_differences_name_kinds_folders_and_totals():
    mix = published_set("llava-v1.5-mix665k")
    found = mix.differences({"image": 624_609, "text": 40_688, "video": 1}, {**mix.folders, "vg": 1, "other": 2})
    assert found == [
        "624609 records of kind image, expected 624610",
        "1 records of kind video, expected 0",
        "2 records with media in other/, expected 0",
        "1 records with media in vg/, expected 86417",
    ]
    pretrain = published_set("llava-pretrain")
    assert pretrain.differences({"image": 595_000}, {}) == ["595000 records, expected 558000 to the nearest 1000"]
    assert pretrain.differences({"image": 557_999, "text": 1}, {}) == ["1 records of kind text, expected none"]


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(ValueError, match="llava-pretrain, llava-v1.5-mix665k"):
        published_set("llava")


def test_the_command_takes_the_names_of_all_sets():
    hint = typing.get_type_hints(llava_mini_cli_data.Check)["published"]
    names = next(typing.get_args(one) for one in typing.get_args(hint) if one is not type(None))
    assert list(names) == list(PUBLISHED_SETS)


def test_video_instructions_become_records_of_llava(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "v_one.mkv").touch()
    source = [
        {"q": "What moves?", "a": "A dog.\nQA_GT_caption_based_noisy", "video_id": "v_one"},
        {"q": "Where?", "a": "Outside.", "video_id": "v_two"},
    ]
    (tmp_path / "given.json").write_text(json.dumps(source))
    made = convert_video_instructions(tmp_path / "given.json", tmp_path / "made.json", videos)
    assert (made.num_records, made.num_missing, made.num_cleaned) == (2, 1, 1)
    mixture = Mixture([DataFile(path=tmp_path / "made.json", media_folder=videos)])
    first, second = mixture[0], mixture[1]
    assert (first.kind, first.media[0].source, second.media[0].source) == (
        "video",
        videos / "v_one.mkv",
        videos / "v_two.mp4",
    )
    assert first.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    assert first.messages[1]["content"] == [{"type": "text", "text": "A dog."}]


def test_another_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "given.json").write_text(json.dumps([{"id": "1", "conversations": []}]))
    with pytest.raises(ValueError, match="Record 0 .* is not an object with texts under q, a, video_id"):
        convert_video_instructions(tmp_path / "given.json", tmp_path / "made.json", tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        convert_video_instructions(tmp_path / "given.json", tmp_path / "made.json", tmp_path / "none")
    assert not (tmp_path / "made.json").exists()
