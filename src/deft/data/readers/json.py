"""A JSON document: an array of rows, each known by the line it begins on; one object; or JSON lines under this name.

A document is held in memory whole; JSON lines are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from deft.core.errors import Problem
from deft.core.types import Origin, Row
from deft.data import json_text
from deft.data.chunks import Chunk, of
from deft.data.readers import jsonl
from deft.data.readers.text import decoded

_BLANK = re.compile(r"[ \t\r\n]*")


def chunks(stream: BinaryIO, source: str) -> Iterator[Chunk]:
    """
    >>> import io
    >>> (chunk,) = chunks(io.BytesIO(b'[{"a": 1},\\n {"a": 2}]'), "a.json")
    >>> [(row.origin.line, row.value) for row in chunk.read()]
    [(1, {'a': 1}), (2, {'a': 2})]
    """
    head = _head(stream)
    if _is_jsonl(head):
        yield from jsonl.chunks(stream, source, b"".join(head))
    else:
        yield from of(_document(b"".join(head) + stream.read(), source), source)


def _head(stream: BinaryIO) -> list[bytes]:
    """The lines up to the second that is not blank."""
    head: list[bytes] = []
    while sum(1 for line in head if line.strip()) < 2 and (line := stream.readline()):
        head.append(line)
    return head


def _is_jsonl(head: list[bytes]) -> bool:
    """True where the first line is a whole value and more follows."""
    lines = [line for line in head if line.strip()]
    if len(lines) < 2:
        return False
    try:
        json.loads(lines[0].removeprefix(jsonl.BOM))
    except (ValueError, RecursionError):
        return False
    return True


def _document(content: bytes, source: str) -> Iterator[Row | Problem]:
    """The rows of a document; a Problem where it goes wrong."""
    text = decoded(content, source)
    if isinstance(text, Problem):
        yield text
    elif text.strip():
        try:
            yield from _rows(source, text)
        except json_text.NotJson as error:
            yield Problem(f"{source}:{error.line}", error.what, error.fix)


def _rows(source: str, text: str) -> Iterator[Row]:
    """The elements of an array, each at its own line; anything else is one row. Raises NotJson."""
    position = _skip(text, 0)
    if text[position] != "[":
        value, end = json_text.decode_at(text, position)
        yield Row(Origin(source, json_text.line_of(text, position)), value)
    else:
        line, counted, item, line_before = 1, 0, 0, 0
        position = _skip(text, position + 1)
        while text[position : position + 1] != "]":
            value, end = json_text.decode_at(text, position)
            line += text.count("\n", counted, position)
            counted, item = position, item + 1
            yield Row(Origin(source, line, item if line == line_before else 0), value)
            line_before = line
            position = _after_comma(text, _skip(text, end))
        end = position + 1
    rest = _skip(text, end)
    if rest < len(text):
        what, fix = "more text after the end of the JSON document", "one document a file, or a row a line"
        raise json_text.NotJson(what, fix, json_text.line_of(text, rest))


def _after_comma(text: str, position: int) -> int:
    """The start of the next element, or of the closing bracket; raises NotJson elsewhere."""
    if text[position : position + 1] == "]":
        return position
    if text[position : position + 1] != ",":
        raise _misplaced("',' or ']' is missing after a row", text, position)
    following = _skip(text, position + 1)
    if text[following : following + 1] == "]":
        raise _misplaced("a comma before ']'", text, position)
    return following


def _misplaced(what: str, text: str, position: int) -> json_text.NotJson:
    return json_text.NotJson(f"not valid JSON: {what}", line=json_text.line_of(text, position))


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position
