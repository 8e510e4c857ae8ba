"""JSON lines: a row a line; blank lines are passed over. Memory holds one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from deft.data import json_text
from deft.errors import Problem
from deft.types import Origin, Row

BOM = b"\xef\xbb\xbf"


def read(stream: BinaryIO, source: str) -> Iterator[Row | Problem]:
    """
    >>> import io
    >>> [row.value for row in read(io.BytesIO(b'{"a": 1}\\n\\n{"a": 2}'), "a.jsonl")]
    [{'a': 1}, {'a': 2}]
    """
    return from_lines(stream, source)


def from_lines(lines: Iterable[bytes], source: str) -> Iterator[Row | Problem]:
    """The rows of lines that are already apart."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.isspace() and line:
            yield _row(Origin(source, number), line)


def _row(origin: Origin, line: bytes) -> Row | Problem:
    try:
        return Row(origin, json_text.decode(line.rstrip(b"\r\n").decode("utf-8")))
    except UnicodeDecodeError as error:
        return Problem(str(origin), f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8")
    except json_text.NotJson as error:
        return Problem(str(origin), error.what, error.fix)
