"""Pieces of text add up to the text, whatever the tokens."""

import pytest

from llava_mini.inference.detokenize import text_pieces


def by_bytes(ids):
    """A decoder whose tokens are bytes; 0 is special."""
    return bytes(i for i in ids if i).decode(errors="replace")


def by_words(ids):
    """A decoder that drops the blank of the first word it is given, as sentencepiece does."""
    return "".join(["", " red", " circle", "s", " left"][i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize(
    "text",
    ["a red circle", "bl\u00e5 cirkel", "\u65e5\u672c\u8a9e and \U0001f600!", "e\u0301", "", "line\n  indented\n"],
)
def test_pieces_add_up_to_the_text(text):
    assert "".join(text_pieces(list(text.encode()), by_bytes)) == text


def test_no_piece_ends_inside_a_character():
    pieces = list(text_pieces(list("\u00e9\U0001f600a".encode()), by_bytes))
    assert pieces == ["\u00e9", "\U0001f600", "a"]


def test_blanks_between_words_are_kept_and_those_before_the_first_are_not():
    assert list(text_pieces([1, 2, 3, 4], by_words)) == ["red", " circle", "s", " left"]
    assert "".join(text_pieces(list(b"  \n red"), by_bytes)) == "red"


def test_special_tokens_are_silent():
    assert list(text_pieces([0, 97, 0, 98, 0], by_bytes)) == ["a", "b"]


def test_an_answer_cut_inside_a_character_says_so():
    assert "".join(text_pieces(list("a\U0001f600".encode())[:-1], by_bytes)) == "a\ufffd"


def test_a_piece_comes_with_its_token_and_not_later():
    given = []

    def tokens():
        for token in b"abc":
            given.append(token)
            yield token

    pieces = text_pieces(tokens(), by_bytes)
    assert next(pieces) == "a"
    assert given == [97]
