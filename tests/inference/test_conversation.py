"""A conversation holds what was said, and nothing of a turn that failed."""

from pathlib import Path

import numpy as np
import pytest

from llava_mini.inference.answer import AnswerStream
from llava_mini.inference.conversation import Conversation
from llava_mini.inference.stats import Stats

IMAGE = np.zeros((4, 4, 3), np.uint8)
OTHER = np.ones((4, 4, 3), np.uint8)


class Echo:
    """Answers with two words, and keeps what it was asked."""

    def __init__(self):
        self.asked = []
        self.error: BaseException | None = None

    def __call__(self, messages):
        self.asked.append(messages)

        def pieces():
            if self.error:
                raise self.error
            yield "answer"
            yield f" {len(self.asked)}"

        return AnswerStream(pieces(), Stats())


def kinds(message):
    return [part["type"] for part in message["content"]]


def test_each_turn_is_asked_with_all_turns_before_it():
    echo = Echo()
    conversation = Conversation(echo, IMAGE)
    assert "".join(conversation.say("first?")) == "answer 1"
    assert "".join(conversation.say("second?")) == "answer 2"
    assert [message["role"] for message in echo.asked[1]] == ["user", "assistant", "user"]
    assert [kinds(message) for message in echo.asked[1]] == [["image", "text"], ["text"], ["text"]]
    assert echo.asked[1][1]["content"] == [{"type": "text", "text": "answer 1"}]


def test_an_added_file_comes_with_the_next_question_only():
    echo = Echo()
    conversation = Conversation(echo, IMAGE)
    list(conversation.say("first?"))
    conversation.add(OTHER)
    list(conversation.say("second?"))
    list(conversation.say("third?"))
    assert [kinds(message) for message in echo.asked[2][::2]] == [["image", "text"], ["image", "text"], ["text"]]
    assert echo.asked[2][2]["content"][0]["image"] is OTHER


def test_a_reset_forgets_the_turns_and_keeps_the_first_files():
    echo = Echo()
    conversation = Conversation(echo, IMAGE)
    list(conversation.say("first?"))
    conversation.add(OTHER)
    conversation.reset()
    assert conversation.messages == []
    list(conversation.say("again?"))
    (message,) = echo.asked[-1]
    assert kinds(message) == ["image", "text"]
    assert message["content"][0]["image"] is IMAGE


def test_a_turn_that_fails_leaves_no_trace():
    echo = Echo()
    conversation = Conversation(echo, IMAGE)
    list(conversation.say("first?"))
    before = conversation.messages
    conversation.add(OTHER)
    echo.error = ValueError("truncated")
    with pytest.raises(ValueError, match="truncated"):
        list(conversation.say("second?"))
    assert conversation.messages == before
    echo.error = None
    list(conversation.say("third?"))
    assert kinds(echo.asked[-1][-1]) == ["text"]


def test_what_was_said_of_a_stopped_answer_stays():
    conversation = Conversation(Echo(), IMAGE)
    stream = conversation.say("first?")
    assert next(stream) == "answer"
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}


def test_a_turn_stopped_before_its_first_word_can_be_asked_again():
    echo = Echo()
    conversation = Conversation(echo, IMAGE)
    conversation.add(OTHER)
    echo.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("first?"))
    echo.error = None
    list(conversation.say("first?"))
    assert [kinds(message) for message in echo.asked[-1]] == [["image", "image", "text"]]


def test_media_that_can_be_read_only_once_are_refused():
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        Conversation(Echo(), iter([IMAGE]))
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        Conversation(Echo()).add(iter([IMAGE]))


def test_a_missing_file_is_refused_when_it_is_added():
    conversation = Conversation(Echo())
    with pytest.raises(ValueError, match=r"There is no file 'nowhere\.png'"):
        conversation.add(Path("nowhere.png"))
