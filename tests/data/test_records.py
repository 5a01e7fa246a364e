import pytest
from PIL import Image

from llava_mini.data.records import Record, Turn

TURNS = (
    Turn(question="What color is it?", answer="red", kind="colour", form="colour"),
    Turn(question="How many?", answer="2", kind="count", form="count"),
)


def test_the_image_stands_in_the_first_question_only():
    messages = Record(turns=TURNS, image=Image.new("RGB", (4, 4))).messages()
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]


def test_the_last_answer_can_be_left_out():
    messages = Record(turns=TURNS).messages(last_answer=False)
    assert messages[-1] == {"role": "user", "content": [{"type": "text", "text": "How many?"}]}


def test_a_record_without_turns_or_with_two_media_is_refused():
    with pytest.raises(ValueError, match="no turns"):
        Record(turns=())
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="an image and a video"):
        Record(turns=TURNS, image=picture, video=(picture,))
