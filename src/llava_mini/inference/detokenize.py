"""Ids to text while they come: each piece of text as soon as it cannot change any more."""

from collections.abc import Callable, Iterable, Iterator

_UNFINISHED = "\ufffd"
"""What a decoder writes for a character of which some bytes are still to come."""


def text_pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Pieces of text that add up to the text of all ``tokens``, without blanks before its first word.

    A decoder may treat the first token of what it is given in a special way, so every step decodes
    a window that begins with tokens told before, and tells what is new in it.

    Args:
        tokens: ids of an answer.
        decode: text of a list of ids, special tokens left out.
    """
    window: list[int] = []
    num_told, begun = 0, False
    for token in tokens:
        window.append(token)
        piece = _new_text(window, num_told, decode)
        if not piece or piece.endswith(_UNFINISHED):
            continue
        window, num_told = window[num_told:], len(window) - num_told
        piece = piece if begun else piece.lstrip()
        if piece:
            begun = True
            yield piece
    if rest := _new_text(window, num_told, decode):
        yield rest if begun else rest.lstrip()


def _new_text(window: list[int], num_told: int, decode: Callable[[list[int]], str]) -> str:
    return decode(window)[len(decode(window[:num_told])) :]
