from pathlib import Path

import pytest

from llava_mini.data.samples import MediaFile, Sample

CAT = MediaFile(kind="image", source=Path("cat.png"))
FILM = MediaFile(kind="video", source=Path("film.mp4"))


def sample(*media: MediaFile) -> Sample:
    parts = [{"type": medium.kind} for medium in media]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}
    return Sample(id="a/1", messages=(question, answer), media=media)


@pytest.mark.parametrize(
    ("media", "kind"),
    [((), "text"), ((CAT,), "image"), ((CAT, CAT), "multi-image"), ((FILM,), "video"), ((CAT, FILM), "video")],
)
def test_the_kind_says_what_is_shown(media, kind):
    assert sample(*media).kind == kind


def test_the_conversation_has_each_source_in_its_place():
    parts = sample(CAT, FILM).conversation()[0]["content"]
    assert [part.get(part["type"]) for part in parts] == [Path("cat.png"), Path("film.mp4"), "What?"]


def test_parts_and_files_must_agree():
    with pytest.raises(ValueError, match="'a/1' have places for image, but its media are video"):
        Sample(id="a/1", messages=sample(CAT).messages, media=(FILM,))


def test_a_caption_keeps_media_and_answers_alone():
    captioned = sample(CAT).captioned()
    assert [message["content"] for message in captioned.messages] == [
        [{"type": "image"}],
        [{"type": "text", "text": "That."}],
    ]
    assert captioned.media == (CAT,)


def test_a_caption_is_the_first_answer():
    turns = sample(CAT).messages
    more = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]}, turns[-1])
    captioned = Sample(id="a/1", messages=(*turns, *more), media=(CAT, CAT)).captioned()
    assert [message["role"] for message in captioned.messages] == ["user", "assistant"]
    assert captioned.media == (CAT,)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (sample().messages, "its first question shows no image or video"),
        (sample().messages[:1], "no answer follows its first question"),
    ],
)
def test_what_has_no_caption_is_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        Sample(id="a/1", messages=messages).captioned()


def test_sources_that_are_no_paths_are_named_by_their_size():
    assert str(MediaFile(kind="image", source=b"12345")) == "5 bytes of a record"
    assert str(MediaFile(kind="image", source="data:image/png;base64,AAAA")) == "a data: address of 26 characters"
