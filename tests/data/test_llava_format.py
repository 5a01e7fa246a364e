from pathlib import Path
from typing import Any

import pytest

from llava_mini.data.llava_format import BYTES_OF_AN_IMAGE, outline, sample_from_record

FOLDER = Path("media")


def record(*texts: str, speakers: tuple[str, ...] = ("human", "gpt"), **fields: Any) -> dict[str, Any]:
    turns = [{"from": speakers[number % len(speakers)], "value": text} for number, text in enumerate(texts)]
    return {"id": "7", "conversations": turns, **fields}


def read(given: Any):
    return sample_from_record(given, name="set/7", media_folder=FOLDER)


def question(given: Any) -> list[str]:
    """The parts of the first question; media in angle brackets."""
    user = next(message for message in read(given).messages if message["role"] == "user")
    return [part.get("text", f"<{part['type']}>") for part in user["content"]]


@pytest.mark.parametrize(
    ("fields", "text", "kind"),
    [
        ({}, "Hello?", "text"),
        ({"image": None}, "Hello?", "text"),
        ({"image": ""}, "Hello?", "text"),
        ({"images": []}, "Hello?", "text"),
        ({"image": {"bytes": None, "path": None}}, "Hello?", "text"),
        ({"image": "a.png"}, "<image>\nWhat?", "image"),
        ({"image": b"pixels"}, "<image>\nWhat?", "image"),
        ({"image": {"bytes": b"pixels", "path": None}}, "<image>\nWhat?", "image"),
        ({"image": ["a.png"]}, "<image>\nWhat?", "image"),
        ({"image": ["a.png", "b.png"]}, "<image><image>\nWhich?", "multi-image"),
        ({"images": ["a.png", "b.png"], "image": None}, "<image>\n<image>\nWhich?", "multi-image"),
        ({"video": "a.mp4"}, "<video>\nWhat?", "video"),
        ({"video": "a.mp4"}, "<image>\nWhat?", "video"),
        ({"video": "a.mp4", "image": "a.png"}, "<image> and <video>", "video"),
    ],
)
def test_outline_and_sample_agree_on_the_kind(fields, text, kind):
    given = record(text, "Yes.", **fields)
    assert outline(given)[0] == read(given).kind == kind


def test_paths_start_at_the_media_folder_and_addresses_stay():
    given = record(
        "<image><image><image>", "Yes.", image=["a/b.png", "https://example.org/c.png", "data:image/png;base64,AA"]
    )
    assert [medium.source for medium in read(given).media] == [FOLDER / "a/b.png", *given["image"][1:]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", ["<image>", "What?"]),
        ("What?\n<image>", ["<image>", "What?"]),
        ("<image>\r\nWhat?\r\n", ["<image>", "What?"]),
        ("What is <image> this?", ["<image>", "What is  this?"]),
        ("<image>", ["<image>"]),
    ],
)
def test_the_only_image_of_a_question_comes_first_as_in_the_released_code(text, parts):
    assert question(record(text, "A cat.", image="a.png")) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\n<image>\nWhich?", ["<image>", "<image>", "Which?"]),
        ("Which?\n<image><image>", ["<image>", "<image>", "Which?"]),
        ("First: <image>\nSecond: <image>\nWhich?", ["First: ", "<image>", "Second: ", "<image>", "Which?"]),
        ("Of these <image> <image> which?", ["Of these ", "<image>", " ", "<image>", " which?"]),
    ],
)
def test_several_images_keep_their_places_among_words(text, parts):
    assert question(record(text, "This.", image=["a.png", "b.png"])) == parts


def test_images_and_videos_of_one_record_go_to_their_own_marks():
    sample = read(record("<video> then <image>", "Yes.", "<video>?", "No.", image="a.png", video=["b.mp4", "c.mp4"]))
    assert [(medium.kind, str(medium.source)) for medium in sample.media] == [
        ("video", "media/b.mp4"),
        ("image", "media/a.png"),
        ("video", "media/c.mp4"),
    ]


def test_marks_in_answers_and_system_texts_are_what_somebody_wrote():
    given = record(
        "Use <image>.", "<image>\nWhat?", "An <image> tag.", speakers=("system", "human", "gpt"), image="a.png"
    )
    assert [message["role"] for message in read(given).messages] == ["system", "user", "assistant"]
    assert read(given).messages[2]["content"] == [{"type": "text", "text": "An <image> tag."}]


def test_what_comes_before_the_first_question_is_left_out():
    given = record("I start.", "<image>\nWhat?", "A bird.", speakers=("gpt", "human"), image="a.png")
    given["conversations"][2]["from"] = "gpt"
    assert [message["role"] for message in read(given).messages] == ["user", "assistant"]


def test_a_question_without_marks_is_kept_to_the_letter():
    assert question(record("  </s> <|eot_id|>\r\n", "Yes.")) == ["  </s> <|eot_id|>\r\n"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "NoneType, not an object"),
        ({"id": "7"}, "no list of turns"),
        ({"id": "7", "conversations": "hello"}, "no list of turns"),
        ({"id": "7", "conversations": []}, "no list of turns"),
        (record("<image>\nWhat?", "A cat."), "1 image in its questions, but names no image and no video"),
        (record("What?", "A cat.", image="a.png"), "no image and no video in its questions, but names 1 image"),
        (record("<image><image>?", "A cat.", image="a.png"), "2 images in its questions, but names 1 image"),
        (record("<image>?", "A cat.", image=["a.png", "b.png"]), "1 image in its questions, but names 2 images"),
        (record("<video>?", "A cat.", image="a.png"), "1 video in its questions, but names 1 image"),
        (record("<image>?", "A cat.", image={"bytes": "..."}), "no path or list of paths"),
        (record("<image>?", "A cat.", image=["a.png", None]), "no path or list of paths"),
        (record("<image>?", image=5), "'5' under 'image', which is no path or list of paths"),
        (record("<image>?", image={"bytes": b"", "path": None}), "no path or list of paths"),
        (record("<image>?", "A cat.", image="a.png", images=["a.png"]), "files under 'image' and 'images'"),
        (record("What?", ""), "Turn 2 of record 'set/7' is an empty answer"),
        (record("What?", "A.", "And?", " \n"), "Turn 4 of record 'set/7' is an empty answer"),
        (record("What?"), "has no answer"),
        (record("A.", "B.", speakers=("gpt",)), "has no answer"),
        (record("What?", "A.", speakers=("human", "robot")), "from 'robot'; it must be from human, gpt, system"),
        (record("What?", "A.", speakers=("human", ["gpt"])), "it must be from"),  # type: ignore[arg-type]
        (record("What?", "A?", "B.", speakers=("human", "human", "gpt")), "like the turn before it"),
        (record("What?", "A.", "Be brief.", speakers=("human", "gpt", "system")), "must come first"),
        (record("What?", 3), "holds int under 'value'"),  # type: ignore[arg-type]
        ({"conversations": ["What?"]}, "Turn 1 of record 'set/7' is from None"),
    ],
)
def test_a_record_that_cannot_be_taught_is_refused_by_its_name(given, reason):
    with pytest.raises(ValueError, match=r"ecord 'set/7'") as refused:
        read(given)
    assert reason in str(refused.value)
    assert outline(given)[0] in ("text", "image", "multi-image")


def test_length_is_in_bytes_of_words_and_counts_images():
    assert outline(record("caf\u00e9", "ok")) == ("text", 7)
    assert outline(record("<image>", "ok", image=["a", "b"])) == ("multi-image", 9 + 2 * BYTES_OF_AN_IMAGE)
    assert outline([]) == ("text", 0)
