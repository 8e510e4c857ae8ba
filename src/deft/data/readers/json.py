"""A JSON document: an array of rows, each known by the line it begins on; one object; or JSON lines under this name.

The rows of an object may stand in a list under one of its fields, or as columns: `documents` says which. A document is
held in memory whole; JSON lines are not. Where a document breaks, what follows cannot be told apart into rows: it is
refused whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from deft.core.errors import InputError, Problem
from deft.core.types import Origin, Row
from deft.data import documents, json_text
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
    """The rows of a document, a Problem for each that is no sound row; InputError where nothing more can be read."""
    text = decoded(content, source)
    if isinstance(text, Problem):
        raise InputError(str(text))
    if text.strip():
        try:
            yield from _rows(source, text)
        except json_text.NotJson as error:
            what = f"{error.what}, and what follows cannot be told apart into rows"
            raise InputError(f"{source}:{error.line}: {what}; {error.fix}") from error


def _rows(source: str, text: str) -> Iterator[Row | Problem]:
    """The elements of an array, each at its own line, or the rows of an object. Raises NotJson."""
    position = _skip(text, 0)
    if text[position] == "[":
        end = yield from _elements(source, text, position)
    else:
        row, end = _row(Origin(source, json_text.line_of(text, position)), text, position)
        if isinstance(row, Problem):
            yield row
        else:
            yield from _inside(source, text, position, row.value)
    rest = _skip(text, end)
    if rest < len(text):
        what, fix = "more text after the end of the JSON document", "one document a file, or a row a line"
        raise json_text.NotJson(what, fix, json_text.line_of(text, rest))


def _row(origin: Origin, text: str, position: int) -> tuple[Row | Problem, int]:
    """The value that begins at `position`, or what is wrong with it, and its end; NotJson where nobody can say that."""
    try:
        value, end = json_text.decode_at(text, position)
    except json_text.NotJson as error:
        end_anyway = json_text.end_of(text, position)
        if end_anyway is None:
            raise
        return Problem(str(origin), error.what, error.fix), end_anyway
    return Row(origin, value), end


def _elements(source: str, text: str, start: int) -> Generator[Row | Problem, None, int]:
    """The elements of the array that begins at `start`; returns where it ends."""
    line, counted, item, line_before = 1, 0, 0, 0
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted, item = position, item + 1
        row, end = _row(Origin(source, line, item if line == line_before else 0), text, position)
        yield row
        line_before = line
        position = _after_comma(text, _skip(text, end))
    return position + 1


def _inside(source: str, text: str, start: int, value: Any) -> Iterator[Row | Problem]:
    """The rows of the value that begins at `start`, or itself; NotJson where they stand in two lists."""
    under = documents.rows_under(value)
    line = json_text.line_of(text, start)
    if len(under) > 1:
        what = f"rows stand under {' and under '.join(map(repr, under))}"
        raise json_text.NotJson(what, "write the list that is meant to a file of its own", line)
    if under:
        yield from _elements(source, text, _start_of(text, start, under[0]))
    else:
        rows = documents.of_table(value)
        places = (Origin(source, line, number) for number in range(1, len(rows) + 1))
        yield from map(Row, places, rows) if rows else [Row(Origin(source, line), value)]


def _start_of(text: str, start: int, key: str) -> int:
    """Where the value of a key begins in the object that begins at `start`."""
    position = _skip(text, start + 1)
    while True:
        name, end = json_text.decode_at(text, position)
        position = _skip(text, _skip(text, end) + 1)
        if name == key:
            return position
        _, end = json_text.decode_at(text, position)
        position = _skip(text, _skip(text, end) + 1)


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
