"""Files of JSON records, larger than memory if need be: where each record lies, and reading one.

A file is a list of records or has one record per line (JSONL); its first character tells. A list is parsed one record
at a time in a window that moves over the file, so a file of 1 GB costs megabytes.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW = 1 << 22
"""Bytes that are read at a time."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\r\n]*")
_PARSE_ERRORS = (ValueError, RecursionError)
"""What ``json`` raises: text that is no JSON or no UTF-8, numbers of thousands of digits, thousands of brackets."""

Found = tuple[int, int, Any]
"""First byte of a record, its number of bytes, and what it holds; None if that is no JSON."""


def scan_records(path: Path) -> Iterator[Found]:
    """Find the records of a file, in order.

    A line of JSONL that is no JSON is a record that holds None: reading it says why. A list cannot be read on after
    such a place.

    Raises:
        ValueError: There is no such file, it is neither a list nor JSONL, or a list is malformed or cut off.
    """
    if not path.is_file():
        raise ValueError(f"There is no data file {str(path)!r}. Give the path of a JSON or JSONL file.")
    with path.open("rb") as file:
        head = file.read(3)
        if head.startswith(_UTF16_MARKS):
            raise ValueError(f"{str(path)!r} is in UTF-16. Write it in UTF-8.")
        start = len(head) if head == _BYTE_ORDER_MARK else 0
        file.seek(start)
        first = _first_character(file)
        file.seek(start)
        if first == b"[":
            yield from _scan_list(file, path)
        elif first == b"{":
            yield from _scan_lines(file, path)
        else:
            raise ValueError(
                f"{str(path)!r} begins with {first.decode('latin-1')!r}: it is neither a JSON list nor JSONL. "
                "Give records as [{...}, {...}], or one {...} per line."
            )


def read_record(path: Path, start: int, size: int) -> Any:
    """Read the record at some bytes of a file.

    Raises:
        ValueError: What lies there is no JSON in UTF-8.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    try:
        return json.loads(data)
    except _PARSE_ERRORS as error:
        raise ValueError(f"The record at byte {start} of {str(path)!r} is no JSON in UTF-8: {error}.") from error


def _first_character(file: io.BufferedReader) -> bytes:
    while chunk := file.read(WINDOW):
        if stripped := chunk.lstrip():
            return stripped[:1]
    return b""


def _parsed(data: bytes) -> Any:
    """What the bytes of a record hold; None if they are no JSON."""
    try:
        return json.loads(data)
    except _PARSE_ERRORS:
        return None


def _scan_lines(file: io.BufferedReader, path: Path) -> Iterator[Found]:
    start, num_parsed, num_lines = file.tell(), 0, 0
    for line in file:
        if line.strip():
            record = _parsed(line)
            num_lines += 1
            num_parsed += record is not None
            yield start, len(line), record
        start += len(line)
    if not num_parsed:
        raise ValueError(
            f"None of the {num_lines} lines of {str(path)!r} is JSON. Is it one object over several lines? Give a list "
            "of records, or one record per line."
        )


def _scan_list(file: io.BufferedReader, path: Path) -> Iterator[Found]:
    """Read in Latin-1, where a character is a byte: the structure of JSON is ASCII, so records end where they do."""
    decode = json.JSONDecoder().raw_decode
    window = _Window(file)
    window.skip_space()
    window.at += 1  # the bracket
    number = 0
    while True:
        character = window.skip_space()
        if character == "]" and number == 0:
            window.at += 1
            break
        while True:
            try:
                record, end = decode(window.text, window.at)
                if end < len(window.text) or not window.extend():
                    break
            except _PARSE_ERRORS as error:
                if not _may_be_cut(error, len(window.text)) or not window.extend():
                    raise ValueError(
                        f"{str(path)!r} is no JSON from byte {window.base + window.at} on, where its record {number} "
                        f"begins: {error}. Was the file cut off?"
                    ) from error
        piece = window.text[window.at : end]
        if not piece.isascii():
            record = _parsed(piece.encode("latin-1"))
        yield window.base + window.at, end - window.at, record
        window.at = end
        number += 1
        character = window.skip_space()
        if character not in (",", "]"):
            raise ValueError(
                f"{str(path)!r} has {character or 'its end'!r} after record {number - 1}, at byte "
                f"{window.base + window.at}, where a comma or the end of the list was expected. Was the file cut off?"
            )
        window.at += 1
        if character == "]":
            break
    if rest := window.skip_space():
        raise ValueError(f"{str(path)!r} goes on with {rest!r} after its list. Give one list, or one record per line.")


def _may_be_cut(error: Exception, length: int) -> bool:
    """Whether text that is no JSON could become JSON by what follows it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > length - 16


class _Window:
    """A part of a file as text with one character per byte."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.base = file.tell()
        """Which byte of the file the text begins with."""
        self.text = ""
        self.at = 0
        """The place in the text that is looked at."""

    def extend(self) -> bool:
        """Read on, and forget what was passed. Returns False at the end of the file, where nothing changes."""
        more = self._file.read(max(WINDOW, len(self.text) - self.at))
        if not more:
            return False
        self.base += self.at
        self.text, self.at = self.text[self.at :] + more.decode("latin-1"), 0
        return True

    def skip_space(self) -> str:
        """Go to the next character that is not white, and return it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.extend():
                return ""
